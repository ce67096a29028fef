"""`diffusers-sana demo`: a real server, a real browser."""

import argparse
import shutil
import socket
import threading
from types import SimpleNamespace
from urllib.parse import urlparse

import pytest
import torch
from PIL import Image

from diffusers_sana.checkpoints import VILA_U_EMOJI
from diffusers_sana.cli import demo
from tests import tiny
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
    """The page in a browser of its own; it may ask no other host for anything."""
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
        assert Image.open(tmp_path / f"{i}.png").size == (128, 128)

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


def test_one_visitor_cannot_occupy_the_page(address, tmp_path):
    """Requests past the page, as scripts send them: bounded before anything is computed."""
    client = gradio_client.Client(address, verbose=False)

    def refused(*arguments, api_name: str) -> str:
        with pytest.raises(gradio_client.exceptions.AppError) as error:
            client.predict(*arguments, api_name=api_name)
        return str(error.value)

    large = tmp_path / "large.png"
    Image.new("1", (8000, 8000)).save(large)  # 64 million pixels in some kilobytes
    handle = gradio_client.handle_file
    assert "at most 2000 characters, but has 3000" in refused("a " * 1500, 0, 1, 4.5, 0, api_name="/generate")
    assert "must be text" in refused(None, 0, 1, 4.5, 0, api_name="/generate")
    assert "at most 25000000 pixels" in refused(handle(str(large)), "What is this?", api_name="/ask")
    assert "at most 2000 characters" in refused(handle(str(large)), "a" * 2001, api_name="/ask")
    large.write_bytes(bytes(21 * 2**20))
    with pytest.raises(Exception, match=r"413|size"):
        client.predict(handle(str(large)), "What is this?", api_name="/ask")


def test_the_queue_is_bounded(monkeypatch):
    from diffusers_sana.demo import page

    comparison = SimpleNamespace(sizes=[(8, 8)], default_steps=1, default_guidance=1.0, pipes={"16 bit": None})
    assert page.build_page(comparison, None, "a model")._queue.max_size == page.MOST_WAITING


def test_other_models():
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
    plain, quantized = comparison.pipes.values()
    assert list(comparison.pipes) == ["32 bit", "4 bit"]
    assert plain is pipe
    assert all(torch.equal(value, before[name]) for name, value in pipe.transformer.state_dict().items())
    shared = {name for name, part in plain.components.items() if quantized.components[name] is part}
    assert shared == set(plain.components) - {"transformer"}
    assert comparison.sizes[0] == (512, 512)
    assert len(comparison.sizes) > 10
    assert (comparison.default_steps, comparison.default_guidance) == (20, 4.5)

    seen = []
    drawings = comparison.generate("a cat", 0, 2, 4.5, comparison.sizes[1], lambda *step: seen.append(step))
    assert seen == [("32 bit", 1), ("32 bit", 2), ("4 bit", 1), ("4 bit", 2)]
    assert [drawing.image.size[::-1] for drawing in drawings] == [comparison.sizes[1]] * 2
    assert drawings[0].megabytes > drawings[1].megabytes
    with pytest.raises(ValueError, match="quantized"):
        Comparison(quantized)


def test_comparison_of_sprint():
    """One size, as there is no table for 32 pixels; two steps."""
    import diffusers_sana
    from diffusers_sana.demo.comparison import Comparison

    comparison = Comparison(sprint_pipeline(diffusers_sana, **WIDER))
    assert comparison.default_steps == 2
    assert comparison.sizes == [(32, 32)]
    assert len(comparison.generate("a cat", 0, 2, 4.5, (32, 32), lambda *step: None)) == 2
