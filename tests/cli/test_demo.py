"""`diffusers-sana demo`: a real server, a real browser."""

import argparse
import asyncio
import http.client
import shutil
import socket
import threading
from base64 import b64decode
from io import BytesIO
from types import SimpleNamespace
from urllib.parse import urlparse

import pytest
import torch
from PIL import Image

from diffusers_sana.checkpoints import VILA_U_EMOJI
from diffusers_sana.cli import demo
from tests import tiny, tiny_video
from tests.pipelines.controlnet_cases import controlnet
from tests.pipelines.sprint_cases import sprint_pipeline


gr = pytest.importorskip("gradio")
gradio_client = pytest.importorskip("gradio_client")
playwright = pytest.importorskip("playwright.sync_api")

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TIMEOUT = 60_000  # milliseconds
WIDER = {"num_attention_heads": 8, "num_cross_attention_heads": 8, "cross_attention_dim": 64}  # for rank 32


def run(*options: str) -> None:
    """The command."""
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    demo.run(parser.parse_args(options))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The address of the page, served by the command in another thread."""
    port = free_port()
    folder = tmp_path_factory.mktemp("gradio")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        torch.set_num_threads(1)
        server = threading.Thread(target=run, args=("--port", str(port)), daemon=True)
        server.start()
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.is_alive(), "the command has ended"
            server.join(0.2)
        yield f"http://127.0.0.1:{port}"
        gr.close_all(verbose=False)


@pytest.fixture
def page(address):
    """The page in a new browser; it may ask no other host for anything."""
    if BROWSER is None:
        pytest.skip("there is no chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(TIMEOUT)
        hosts = set()
        page.on("request", lambda request: hosts.add(urlparse(request.url).netloc))
        page.goto(address)
        yield page
        browser.close()
        assert hosts - {""} == {urlparse(address).netloc}


def generate(page, steps="2", seed="0") -> list[bytes]:
    """Asks for an image; the files of both."""
    page.reload()  # no image is left from before
    page.locator("#prompt textarea").fill("a lemon on a black background")
    page.locator("#steps input").fill(steps)
    page.locator("#seed input").fill(seed)
    page.get_by_role("button", name="Generate", exact=True).click()
    page.locator("#images img").nth(1).wait_for()
    page.locator("#figures b").nth(1).wait_for()
    return [page.request.get(image.get_attribute("src")).body() for image in page.locator("#images img").all()]


def test_generates_and_answers(page, tmp_path):
    first = generate(page)
    assert page.locator("#figures b").all_inner_texts() == ["16 bit", "4 bit"]
    assert first[0] != first[1]
    for i, file in enumerate(first):
        (tmp_path / f"{i}.png").write_bytes(file)
        assert Image.open(tmp_path / f"{i}.png").size == (256, 256)

    other = generate(page, seed="1")
    assert other[0] != first[0]
    assert other[1] != first[1]
    assert generate(page) == first

    page.locator("#pass").click()
    page.locator("#image img").wait_for()
    page.locator("#question input, #question textarea").fill("Which colour is the background?")
    page.get_by_role("button", name="Ask", exact=True).click()
    answer = page.locator("#answer input, #answer textarea")
    playwright.expect(answer).to_have_value("black", timeout=TIMEOUT)


def test_says_what_is_wrong(page):
    def expect(message: str) -> None:
        page.get_by_text(message).wait_for()

    button = page.get_by_role("button", name="Generate", exact=True)
    page.locator("#prompt textarea").fill(" ")
    button.click()
    expect("The prompt is empty. Write one.")
    page.locator("#prompt textarea").fill("a lemon")
    page.locator("#steps input").fill("0")
    button.click()
    expect("Steps must be from 1 to 100, but are 0.")
    page.locator("#steps input").fill("1")
    page.locator("#seed input").fill("-1")
    button.click()
    expect("The seed must be a number from 0 to 4294967295, but is -1.")
    page.locator("#pass").click()
    expect("There is no image yet. Generate one first.")


def draw(page, editor: str) -> None:
    """A stroke across an editor, with the mouse."""
    page.locator(f"#{editor} button[aria-label='Brush'], #{editor} button[title='Brush']").first.click()
    box = page.locator(f"#{editor} canvas").first.bounding_box()
    left, top, width, height = (box[side] for side in ("x", "y", "width", "height"))
    page.mouse.move(left + 0.3 * width, top + 0.4 * height)
    page.mouse.down()
    for i in range(5):
        page.mouse.move(left + (0.3 + 0.08 * i) * width, top + (0.4 + 0.04 * i) * height)
    page.mouse.up()


def test_sketch_and_mask_are_drawn_in_the_page(page, tmp_path):
    """The images end in the gallery, beside those from text."""
    page.set_viewport_size({"width": 1200, "height": 1400})
    generate(page, steps="1")
    page.get_by_role("tab", name="Sketch", exact=True).click()
    page.locator("#sketch canvas").first.wait_for()
    page.get_by_role("button", name="Follow the sketch").click()
    page.get_by_text("Nothing is drawn. Draw some outlines first.").wait_for()
    draw(page, "sketch")
    page.get_by_role("button", name="Follow the sketch").click()
    images = page.locator("#gallery button img")
    playwright.expect(images).to_have_count(2, timeout=TIMEOUT)

    page.get_by_role("tab", name="Mask", exact=True).click()
    Image.new("RGB", (128, 128), "orange").save(tmp_path / "orange.png")
    page.locator("#mask input[type=file]").first.set_input_files(str(tmp_path / "orange.png"))
    page.locator("#mask canvas").first.wait_for()
    page.wait_for_timeout(1000)  # until the image is on the canvas
    draw(page, "mask")
    page.get_by_role("button", name="Repaint").click()
    playwright.expect(images).to_have_count(3, timeout=TIMEOUT)


def test_works_with_a_keyboard_and_on_a_phone(page):
    page.set_viewport_size({"width": 390, "height": 844})
    page.reload()
    page.locator("#steps input").fill("1")
    for tab in ("Image", "Mask", "Sketch", "Text", "Ask", "Generate"):
        page.get_by_role("tab", name=tab, exact=True).click()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.locator("#prompt textarea").focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("a lemon")
    page.keyboard.press("Enter")
    page.locator("#images img").nth(1).wait_for()
    box = page.locator("#images").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 390
    for _ in range(30):  # from the prompt on, Tab comes to every control
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "random":
            break
    before = page.locator("#seed input").input_value()
    page.keyboard.press("Enter")
    playwright.expect(page.locator("#seed input")).not_to_have_value(before, timeout=TIMEOUT)


@pytest.fixture
def files(tmp_path):
    """Saves an image, and returns what a client sends of it."""

    def save(image: Image.Image):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.png"
        image.save(path)
        return gradio_client.handle_file(str(path))

    return save


def test_what_an_image_can_start_from_in_the_page(address, files):
    client = gradio_client.Client(address, verbose=False)
    call = ("a lemon on a black background", 0, 2, 4.5, 0)

    def result(*inputs, api_name):
        images, figures, gallery = client.predict(*call, None, *inputs, api_name=api_name)
        assert "4 bit" in figures
        assert gallery[0]["caption"] == "a lemon on a black background, seed 0"
        return [Image.open(image).convert("RGB") for image in images]

    orange = Image.new("RGB", (256, 256), "orange")
    text = result(api_name="/generate")
    changed = result(files(orange), 0.5, api_name="/change")
    mask = Image.new("RGBA", (256, 256))
    mask.paste("teal", (128, 0, 256, 256))  # the right half
    repainted = result({"background": files(orange), "layers": [files(mask)], "composite": None}, api_name="/repaint")
    lines = Image.new("RGB", (256, 256), "white")
    lines.paste("black", (80, 80, 88, 180))
    sketched = result({"background": None, "layers": [], "composite": files(lines)}, 1.0, api_name="/follow")
    for i in range(2):
        assert len({image.tobytes() for image in (text[i], changed[i], repainted[i], sketched[i])}) == 4
        left, right = (repainted[i].crop((x, 0, x + 120, 256)) for x in (0, 136))
        assert max(abs(value - 255) for value in left.getchannel("R").tobytes()) <= 2
        assert right.getcolors() is None or len(right.getcolors()) > 50

    gallery = client.predict(*call, [{"image": files(orange), "caption": "mine"}] * 30, api_name="/generate")[2]
    assert len(gallery) == 24
    assert gallery[1]["caption"] == "mine"


def test_one_visitor_cannot_occupy_the_page(address, tmp_path, files):
    """Requests past the page, as scripts send them: bounded before anything is computed."""
    client = gradio_client.Client(address, verbose=False)

    def refused(*arguments, api_name: str) -> str:
        with pytest.raises(gradio_client.exceptions.AppError) as error:
            client.predict(*arguments, api_name=api_name)
        return str(error.value)

    call = ("a lemon", 0, 1, 4.5, 0, None)
    large = files(Image.new("1", (8000, 8000)))  # 64 million pixels in some kilobytes
    small = files(Image.new("RGBA", (8, 8)))
    white = files(Image.new("RGB", (8, 8), "white"))
    assert "at most 2000 characters, but has 3000" in refused("a " * 1500, *call[1:], api_name="/generate")
    assert "must be text" in refused(None, *call[1:], api_name="/generate")
    assert "at most 25000000 pixels" in refused(large, "What is this?", api_name="/ask")
    assert "at most 2000 characters" in refused(small, "a" * 2001, api_name="/ask")
    assert "at most 25000000 pixels" in refused(*call, large, 0.5, api_name="/change")
    for parts in (
        {"background": large, "layers": [small], "composite": None},
        {"background": small, "layers": [large], "composite": None},
        {"background": small, "layers": [small], "composite": large},
    ):
        assert "at most 25000000 pixels" in refused(*call, parts, api_name="/repaint")
    many = {"background": small, "layers": [small] * 9, "composite": None}
    assert "at most 8 layers" in refused(*call, many, api_name="/repaint")
    path = tmp_path / "text.png"
    path.write_text("no image")
    broken = {"background": gradio_client.handle_file(str(path)), "layers": [small], "composite": None}
    assert "The image cannot be read. Choose another." in refused(*call, broken, api_name="/repaint")
    unpainted = {"background": white, "layers": [small], "composite": None}
    assert "Nothing is painted over" in refused(*call, unpainted, api_name="/repaint")
    blank = {"background": None, "layers": [], "composite": white}
    assert "Nothing is drawn" in refused(*call, blank, 1, api_name="/follow")
    path = tmp_path / "large.png"
    path.write_bytes(bytes(21 * 2**20))
    with pytest.raises(Exception, match=r"413|size"):
        client.predict(gradio_client.handle_file(str(path)), "What is this?", api_name="/ask")


def test_parts_of_drawings_that_pages_send_are_bounded():
    """Gradio keeps them until a call uses them, and would make room for any index."""
    from diffusers_sana.demo import page

    editor = page._editor("Draw", (), "#000000", "sketch", 10)

    def send(drawing, **data):
        data = {"type": "composite", "index": None, "id": drawing} | data
        editor.accept_blobs(SimpleNamespace(data=data, files=[("file", b"png")]))

    for index in (str(10**12), "+1000000000000", "1_000_000_000_000", "-1"):
        with pytest.raises(gr.Error, match="at most 8 layers"):
            send("a", type="layer", index=index)
    send("a", type="layer", index="7")
    for i in range(1000):
        send(str(i))
    assert len(editor.blob_storage) <= 2 * page.MOST_WAITING + 1
    assert editor.blob_storage["999"].composite == b"png"


def test_bodies_are_bounded(address):
    """Of every address, stated or in chunks."""
    from diffusers_sana.demo import page

    connection = http.client.HTTPConnection(urlparse(address).netloc, timeout=TIMEOUT / 1000)
    connection.putrequest("POST", "/gradio_api/component_server")
    connection.putheader("Content-Length", str(10**9))
    connection.endheaders()
    assert connection.getresponse().status == 413

    received = []

    async def app(scope, receive, send):
        received.extend([await receive() for _ in range(3)])

    async def receive():
        return {"type": "http.request", "body": bytes(4), "more_body": True}

    asyncio.run(page.BodyLimit(app, most=10)({"type": "http", "headers": []}, receive, None))
    assert [message["type"] for message in received] == ["http.request", "http.request", "http.disconnect"]


def test_the_queue_is_bounded(monkeypatch):
    from diffusers_sana.demo import page

    comparison = SimpleNamespace(sizes=[(8, 8)], default_steps=1, default_guidance=1.0, pipes={"16 bit": {}})
    assert page.build_page(comparison, None, "a model")._queue.max_size == page.MOST_WAITING


def test_a_model_of_videos_has_a_tab_of_its_own():
    """And only that one: what it generates is what the pipeline generates."""
    import diffusers_sana
    from diffusers_sana.demo import page
    from diffusers_sana.demo.videos import Videos

    def tabs(blocks):
        return [block["props"]["label"] for block in blocks.config["components"] if block["type"] == "tabitem"]

    comparison = SimpleNamespace(sizes=[(8, 8)], default_steps=1, default_guidance=1.0, pipes={"16 bit": {}})
    assert tabs(page.build_page(comparison, None, "a model")) == ["Generate", "Text", "Ask"]

    pipe, seen = tiny_video.pipeline(diffusers_sana), []
    videos = Videos(pipe, 10)
    assert (videos.default_steps, videos.default_guidance, videos.default_frames, videos.step) == (50, 6.0, 81, 4)
    shown = page.build_video_page(videos, None, "a model")
    assert tabs(shown) == ["Video", "Ask"]
    assert shown._queue.max_size == page.MOST_WAITING
    generate = next(function.fn for function in shown.fns.values() if function.fn.__name__ == "generate")
    html, figures = generate("a <cat>", 3, 2, 6.0, 5, None, lambda *step, **_: seen.append(step))
    assert "5 frames at 10 per second" in figures
    assert seen == [((1, 2),), ((2, 2),)]
    assert '<img alt="a &lt;cat&gt;" src="data:image/webp;base64,' in html
    file = BytesIO(b64decode(html.rpartition(",")[2].partition('"')[0]))
    wanted = pipe("a <cat>", frames=5, num_inference_steps=2, generator=torch.Generator().manual_seed(3)).frames[0]
    with Image.open(file) as made:
        assert (made.n_frames, made.size) == (5, wanted[0].size)
    with pytest.raises(gr.Error, match="Frames must be from 1 to 81, but are 85"):
        generate("a cat", 3, 2, 6.0, 85, None)
    with pytest.raises(gr.Error, match="one more than a multiple of 4"):
        generate("a cat", 3, 2, 6.0, 6, None)
    first = Image.new("RGB", (64, 32), "red")
    assert videos.generate("a cat", 3, 2, 6.0, 5, lambda *step: None, first).frames == 5

    long = Videos(tiny_video.pipeline(diffusers_sana, "LongSanaVideoPipeline"), 16)
    assert (long.default_steps, long.default_guidance, long.takes_image) == (None, None, False)
    assert long.generate("a cat", 3, None, None, 5, lambda *step: None).frames == 5


def test_other_models():
    with pytest.raises(ValueError, match="--controlnet must be left out for a SANA-Sprint"):
        run("--model", "sana-emoji-sprint", "--controlnet", "sana-emoji-edges")
    with pytest.raises(ValueError, match="--model must be a Sana or a SANA-Sprint"):
        run("--model", VILA_U_EMOJI)
    with pytest.raises(OSError, match=r"there is no folder \./no-such-folder"):
        run("--model", "./no-such-folder")


def test_comparison():
    """Of the copy only the transformer is another; sizes and defaults are those of the checkpoint and its pipeline."""
    import diffusers_sana
    from diffusers_sana.demo.comparison import Comparison

    pipe = tiny.pipeline(diffusers_sana, num_stages=6, **WIDER)  # 512 pixels, of which there is a table of sizes
    before = pipe.transformer.state_dict()
    comparison = Comparison(pipe)
    assert list(comparison.pipes) == ["32 bit", "4 bit"]
    plain, quantized = (pipes["text"] for pipes in comparison.pipes.values())
    assert plain is pipe
    assert all(torch.equal(value, before[name]) for name, value in pipe.transformer.state_dict().items())
    shared = {name for name, part in plain.components.items() if quantized.components[name] is part}
    assert shared == set(plain.components) - {"transformer"}
    assert comparison.sizes[0] == (512, 512)
    assert len(comparison.sizes) > 10
    assert (comparison.default_steps, comparison.default_guidance) == (20, 4.5)

    seen = []
    drawings = comparison.generate("a cat", 0, 2, 4.5, comparison.sizes[1], lambda *step: seen.append(step))
    assert seen == [("32 bit", 1, 2), ("32 bit", 2, 2), ("4 bit", 1, 2), ("4 bit", 2, 2)]
    assert [drawing.image.size[::-1] for drawing in drawings] == [comparison.sizes[1]] * 2
    assert drawings[0].megabytes > drawings[1].megabytes
    with pytest.raises(ValueError, match="quantized"):
        Comparison(quantized)


def test_what_an_image_starts_from():
    """Each pipeline shares its parts with that for text, and uses what it is given."""
    import diffusers_sana
    from diffusers_sana.demo.comparison import Comparison

    branch = controlnet(**WIDER)
    comparison = Comparison(tiny.pipeline(diffusers_sana, **WIDER), branch)
    for pipes in comparison.pipes.values():
        assert list(pipes) == ["text", "image", "mask", "sketch"]
        assert all(pipe.transformer is pipes["text"].transformer for pipe in pipes.values())
        assert pipes["sketch"].controlnet is branch

    image, seen = Image.new("RGB", (32, 32), "red"), []

    def generate(*start, **inputs):
        results = comparison.generate("a cat", 0, 2, 4.5, (32, 32), lambda *step: seen.append(step), *start, **inputs)
        return [result.image for result in results]

    text = generate()
    for start, inputs, last in (
        ("image", {"image": image, "strength": 0.5}, ("4 bit", 1, 1)),
        ("mask", {"image": image, "mask_image": Image.linear_gradient("L").resize((32, 32))}, ("4 bit", 2, 2)),
        ("sketch", {"control_image": image}, ("4 bit", 2, 2)),
    ):
        assert all(one != other for one, other in zip(generate(start, **inputs), text, strict=True))
        assert seen[-1] == last


def test_comparison_of_sprint():
    """One size, as there is no table for 32 pixels; two steps."""
    import diffusers_sana
    from diffusers_sana.demo.comparison import Comparison

    comparison = Comparison(sprint_pipeline(diffusers_sana, **WIDER))
    assert comparison.default_steps == 2
    assert all(list(pipes) == ["text", "image"] for pipes in comparison.pipes.values())
    assert comparison.sizes == [(32, 32)]
    assert len(comparison.generate("a cat", 0, 2, 4.5, (32, 32), lambda *step: None)) == 2
