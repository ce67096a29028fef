"""The page: a tab that generates images or videos and one that answers questions. It loads nothing from elsewhere."""

import random
from collections.abc import Callable
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from gradio.components.base import server
from PIL import Image, ImageOps
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

from diffusers_sana.demo.comparison import Comparison, Generated
from diffusers_sana.demo.videos import Videos
from diffusers_sana.images import image_size, read_image, to_rgb


THEME = gr.themes.Soft(primary_hue="teal", secondary_hue="teal", neutral_hue="slate", font=("system-ui", "sans-serif"))
CSS = """
.gradio-container { width: 100% !important; max-width: 1060px !important; margin: 0 auto; }
#video img { width: 100%; }
#images img, #image img { width: 100%; height: 100%; object-fit: contain; }
.figures { display: flex; justify-content: space-between; font-size: 0.95rem; }
.figures div { line-height: 1.5; }
.figures div:last-child { text-align: right; }
.figures b { font-size: 1.1rem; }
"""
PROMPTS = [
    "a panda on a yellow background",
    "an apple on a blue background",
    "a fox on a green background, flat style",
    "a penguin on a pink background",
]
QUESTIONS = ["What is this?", "Which colour is the background?", "Describe the picture."]
PROGRESS = gr.Progress()  # as a default value it makes Gradio pass the progress of each call
LARGEST_SEED = 2**32 - 1
# The visitors of a shared page share one device. These limits keep one of them from occupying it for long.
MOST_STEPS = 100
MOST_CHARACTERS = 2000
MOST_WAITING = 20
MOST_UPLOADED = 20 * 2**20  # bytes
MOST_OF_A_BODY = MOST_UPLOADED + 2**20  # bytes; of any request, since Gradio limits only the plain upload
MOST_PIXELS = 25_000_000  # of an uploaded image; a small file can contain a very large image
MOST_LAYERS = 8  # of an editor
MOST_KEPT = 24  # images of a visitor's gallery
CANVAS = (512, 512)  # of an editor
# As a path, so that nothing is decoded before its size is checked.
UPLOAD: dict[str, Any] = {
    "type": "filepath",
    "image_mode": None,
    "label": "Image",
    "sources": ["upload", "clipboard"],
}
TURNS = {"concurrency_id": "device", "concurrency_limit": 1}  # one call at a time: all need the whole device
FILES_KEPT = (3600, 4 * 3600)  # seconds between deletions of visitors' files, and their age


def build_page(comparison: Comparison, answerer: Any, title: str) -> gr.Blocks:
    """Builds the page; `serve` serves it.

    Args:
        comparison: generates the images.
        answerer: a `VilaUPipeline`.
        title: name of the generating model.
    """

    def sample(
        progress: Any, prompt: str, seed: int, steps: int, guidance: float, size: int, kept: list | None, **inputs: Any
    ) -> tuple:
        """An image in both precisions, their figures, and the gallery with the first of them."""
        _check_call(prompt, seed, steps)
        if size is None:
            raise _message("No size is chosen. Choose one.")

        def on_step(precision: str, done: int, total: int) -> None:
            progress((done, total), desc=precision, unit="steps")

        try:
            results = comparison.generate(prompt, seed, steps, guidance, comparison.sizes[size], on_step, **inputs)
        except (TypeError, ValueError) as error:
            raise _message(str(error)) from error
        newest = (results[0].image, f"{prompt}, seed {seed}")
        return tuple(result.image for result in results), _figures(results), [newest, *(kept or [])][:MOST_KEPT]

    def generate(
        prompt: str, seed: int, steps: int, guidance: float, size: int, kept: list | None, progress: Any = PROGRESS
    ) -> tuple:
        """Generates an image in 16 and in 4 bits."""
        return sample(progress, prompt, seed, steps, guidance, size, kept)

    def change(
        prompt: str,
        seed: int,
        steps: int,
        guidance: float,
        size: int,
        kept: list | None,
        path: str | None,
        strength: float,
        progress: Any = PROGRESS,
    ) -> tuple:
        """Changes an image."""
        inputs = {"start": "image", "image": _read(path), "strength": strength}
        return sample(progress, prompt, seed, steps, guidance, size, kept, **inputs)

    def repaint(
        prompt: str,
        seed: int,
        steps: int,
        guidance: float,
        size: int,
        kept: list | None,
        painted: dict[str, Any] | None,
        progress: Any = PROGRESS,
    ) -> tuple:
        """Repaints what is painted over in an image."""
        if painted is None or painted["background"] is None:
            raise _message("There is no image. Choose one first.")
        layers = [np.asarray(layer.convert("RGBA"))[..., 3] for layer in painted["layers"]]
        if not any(layer.any() for layer in layers):
            raise _message("Nothing is painted over. Paint over what is to change.")
        mask = Image.fromarray(np.maximum.reduce(layers))
        inputs = {"start": "mask", "image": to_rgb(painted["background"]), "mask_image": mask}
        return sample(progress, prompt, seed, steps, guidance, size, kept, **inputs)

    def follow(
        prompt: str,
        seed: int,
        steps: int,
        guidance: float,
        size: int,
        kept: list | None,
        drawn: dict[str, Any] | None,
        strength: float,
        progress: Any = PROGRESS,
    ) -> tuple:
        """Generates an image that follows a sketch."""
        lines = None if drawn is None else drawn["composite"]
        if lines is None or (lines := ImageOps.invert(to_rgb(lines))).getbbox() is None:
            raise _message("Nothing is drawn. Draw some outlines first.")
        inputs = {"start": "sketch", "control_image": lines, "controlnet_conditioning_scale": strength}
        return sample(progress, prompt, seed, steps, guidance, size, kept, **inputs)

    def pass_on(images: tuple[Image.Image | None, ...] | None) -> tuple:
        """Passes the first image to the other tab."""
        if images is None or images[0] is None:
            raise _message("There is no image yet. Generate one first.")
        return images[0], gr.Tabs(selected="ask")

    sizes = [(f"{width} x {height}", i) for i, (height, width) in enumerate(comparison.sizes)]
    starts = next(iter(comparison.pipes.values()))
    buttons: dict[str, tuple[gr.Button, Callable[..., tuple], list[Any]]] = {}
    with gr.Blocks(title="diffusers_sana", analytics_enabled=False, delete_cache=FILES_KEPT) as page:
        gr.Markdown(f"# diffusers_sana\nThe same seed in two precisions: **{title}** as it is and in 4 bits.")
        with gr.Tabs() as tabs:
            with gr.Tab("Generate", id="generate"), gr.Row():
                with gr.Column(scale=5):
                    prompt = gr.Textbox(PROMPTS[0], label="Prompt", lines=1, elem_id="prompt")
                    with gr.Row():
                        seed = gr.Number(0, label="Seed", precision=0, min_width=90, elem_id="seed")
                        steps = gr.Number(
                            comparison.default_steps, label="Steps", precision=0, min_width=90, elem_id="steps"
                        )
                    random_button = gr.Button("Another seed", size="sm", elem_id="random")
                    guidance = gr.Slider(1, 10, comparison.default_guidance, step=0.1, label="Guidance")
                    size = gr.Dropdown(sizes, value=0, label="Size", visible=len(sizes) > 1)
                    with gr.Tabs():
                        with gr.Tab("Text"):
                            button = gr.Button("Generate", variant="primary", elem_id="generate")
                            buttons["text"] = (button, generate, [])
                            gr.Examples([[text] for text in PROMPTS], prompt, label="Prompts to try")
                        if "image" in starts:
                            with gr.Tab("Image"):
                                image = gr.Image(**UPLOAD, height=240, elem_id="start-image")
                                strength = gr.Slider(
                                    0.05, 1, 0.6, step=0.05, label="Strength", info="How much of it may change."
                                )
                                button = gr.Button("Change", variant="primary", elem_id="change")
                                buttons["image"] = (button, change, [image, strength])
                        if "mask" in starts:
                            with gr.Tab("Mask"):
                                editor = _editor(
                                    "Paint over what is to change", ("upload", "clipboard"), "#14b8a6", "mask", 40
                                )
                                button = gr.Button("Repaint", variant="primary", elem_id="repaint")
                                buttons["mask"] = (button, repaint, [editor])
                        if "sketch" in starts:
                            with gr.Tab("Sketch"):
                                editor = _editor("Draw outlines", (), "#000000", "sketch", 10)
                                control = gr.Slider(
                                    0, 1.5, 1, step=0.05, label="Strength", info="How closely they are followed."
                                )
                                button = gr.Button("Follow the sketch", variant="primary", elem_id="follow")
                                buttons["sketch"] = (button, follow, [editor, control])
                with gr.Column(scale=6):
                    slider = gr.ImageSlider(
                        type="pil",
                        format="png",  # lossless: equal images are equal files
                        label=" | ".join(comparison.pipes),
                        height=440,
                        interactive=False,
                        elem_id="images",
                    )
                    figures = gr.HTML(elem_id="figures")
                    pass_button = gr.Button("Ask about this image", size="sm", elem_id="pass")
                    gallery = gr.Gallery(
                        format="png", label="Yours so far", columns=6, height=180, interactive=False, elem_id="gallery"
                    )
            asked = _ask_tab(answerer)

        page.queue(max_size=MOST_WAITING)
        for start, (button, function, inputs) in buttons.items():
            triggers = [button.click, prompt.submit] if start == "text" else [button.click]
            shared = [prompt, seed, steps, guidance, size, gallery]
            gr.on(triggers, function, shared + inputs, [slider, figures, gallery], show_progress_on=slider, **TURNS)
        random_button.click(lambda: random.randint(0, LARGEST_SEED), None, seed, api_visibility="private")
        pass_button.click(pass_on, slider, [asked, tabs])
    return page


def build_video_page(videos: Videos, answerer: Any, title: str) -> gr.Blocks:
    """`build_page` for a model of videos.

    Args:
        videos: generates them.
        answerer: a `VilaUPipeline`.
        title: name of the generating model.
    """

    def generate(
        prompt: str,
        seed: int,
        steps: int,
        guidance: float,
        frames: int,
        path: str | None,
        progress: Any = PROGRESS,
    ) -> tuple[str, str]:
        """Generates a video."""
        _check_call(prompt, seed, steps)
        if frames is None or not 1 <= frames <= videos.default_frames:
            raise _message(f"Frames must be from 1 to {videos.default_frames}, but are {frames}.")
        image = None if path is None else _read(path)

        def on_step(done: int, total: int) -> None:
            progress((done, total), desc="Video", unit="steps")

        try:
            made = videos.generate(prompt, seed, steps, guidance, frames, on_step, image)
        except (TypeError, ValueError) as error:
            raise _message(str(error)) from error
        shown = f'<img alt="{escape(prompt)}" src="{made.url}">'
        return shown, f"<div>{made.frames} frames at {videos.fps:g} per second, made in {made.seconds:.1f} s</div>"

    with gr.Blocks(title="diffusers_sana", analytics_enabled=False, delete_cache=FILES_KEPT) as page:
        gr.Markdown(f"# diffusers_sana\nVideos by **{title}**.")
        with gr.Tabs():
            with gr.Tab("Video", id="video"), gr.Row():
                with gr.Column(scale=5):
                    prompt = gr.Textbox(PROMPTS[0], label="Prompt", lines=1, elem_id="prompt")
                    seed = gr.Number(0, label="Seed", precision=0, elem_id="seed")
                    steps = gr.Number(
                        videos.default_steps or 1,
                        label="Steps",
                        precision=0,
                        visible=videos.default_steps is not None,
                        elem_id="steps",
                    )
                    guidance = gr.Slider(
                        1,
                        10,
                        videos.default_guidance or 1,
                        step=0.1,
                        label="Guidance",
                        visible=videos.default_guidance is not None,
                    )
                    frames = gr.Slider(
                        1, videos.default_frames, videos.default_frames, step=videos.step, label="Frames"
                    )
                    first = gr.Image(
                        **UPLOAD | {"label": "First frame, or none"}, height=240, visible=videos.takes_image
                    )
                    button = gr.Button("Generate", variant="primary", elem_id="generate")
                with gr.Column(scale=6):
                    video = gr.HTML(min_height=240, elem_id="video")
                    figures = gr.HTML(elem_id="figures")
            _ask_tab(answerer)
        page.queue(max_size=MOST_WAITING)
        given = [prompt, seed, steps, guidance, frames, first]
        triggers = [button.click, prompt.submit]
        gr.on(triggers, generate, given, [video, figures], show_progress_on=video, **TURNS)
    return page


def _ask_tab(answerer: Any) -> gr.Image:
    """The tab that answers questions about an image, which it returns."""

    def ask(path: str | None, question: str) -> str:
        """Answers a question about an image."""
        image = _read(path)
        _check_text("question", question)
        try:
            return answerer.chat(image, question)
        except (TypeError, ValueError) as error:
            raise _message(str(error)) from error

    with gr.Tab("Ask", id="ask"), gr.Row():
        with gr.Column(scale=5):
            asked = gr.Image(**UPLOAD, height=380, elem_id="image")
        with gr.Column(scale=6):
            question = gr.Textbox(QUESTIONS[0], label="Question", elem_id="question")
            button = gr.Button("Ask", variant="primary", elem_id="ask")
            answer = gr.Textbox(label="Answer", interactive=False, elem_id="answer")
            gr.Examples([[text] for text in QUESTIONS], question, label="Questions to try")
    gr.on([button.click, question.submit], ask, [asked, question], answer, **TURNS)
    return asked


def serve(page: gr.Blocks, port: int | None = None, share: bool = False) -> None:
    """Serves the page until Ctrl-C.

    Args:
        page: from `build_page`.
        port: of this machine; None for the first free one from 7860.
        share: also serve it at a public address, through Gradio's servers.
    """
    page.launch(
        server_port=port,
        share=share,
        max_file_size=MOST_UPLOADED,
        theme=THEME,
        css=CSS,
        footer_links=[],
        run_history=False,
        app_kwargs={"middleware": [Middleware(BodyLimit, most=MOST_OF_A_BODY)]},
        ssr_mode=False,
    )


class BodyLimit:
    """Refuses requests with larger bodies, before they are in memory or on the disk.

    Args:
        app: the ASGI application behind it.
        most: bytes.
    """

    def __init__(self, app: Any, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers a request."""
        size = dict(scope.get("headers", ())).get(b"content-length", b"0")
        if size.isdigit() and int(size) > self.most:
            await PlainTextResponse(f"at most {self.most} bytes", 413)(scope, receive, send)
            return
        received = 0

        async def bounded() -> Any:  # a body in chunks does not state its size
            nonlocal received
            message = await receive()
            received += len(message.get("body", b"")) if message["type"] == "http.request" else 0
            return message if received <= self.most else {"type": "http.disconnect"}

        await self.app(scope, bounded, send)


def _editor(label: str, sources: Any, color: str, name: str, brush: int) -> gr.ImageEditor:
    """An image to draw on, which refuses what is too large before it is decoded: Gradio sets no limits here."""
    editor = gr.ImageEditor(
        type="pil",
        format="png",
        label=label,
        sources=sources,
        brush=gr.Brush(default_size=brush, colors=[color], color_mode="fixed"),
        transforms=(),
        layers=False,
        canvas_size=CANVAS,
        height=360,
        elem_id=name,
    )
    decode, accept = editor.preprocess, editor.accept_blobs

    def preprocess(payload: Any) -> Any:
        drawing = payload if payload is None or payload.id is None else editor.blob_storage.get(payload.id)
        if drawing is not None:
            if len(drawing.layers or ()) > MOST_LAYERS:
                raise _message(f"The image must have at most {MOST_LAYERS} layers, but has {len(drawing.layers)}.")
            files = [file for file in (drawing.background, drawing.composite, *(drawing.layers or ())) if file]
            try:
                for file in files:
                    _check_pixels(BytesIO(file) if isinstance(file, bytes) else file.path)
                return decode(payload)
            except gr.Error:  # which is a ValueError
                raise
            except (OSError, SyntaxError, ValueError) as error:
                raise _message("The image cannot be read. Choose another.") from error
        return decode(payload)

    @server
    def accept_blobs(data: Any) -> None:
        """Keeps a part of an image that a page sends before the call that uses it."""
        index = data.data["index"]
        if index and index != "null" and not 0 <= int(index) < MOST_LAYERS:  # as Gradio reads it
            raise _message(f"The image must have at most {MOST_LAYERS} layers.")
        while len(editor.blob_storage) > 2 * MOST_WAITING:  # the oldest are of pages that made no call
            editor.blob_storage.pop(next(iter(editor.blob_storage)), None)
        accept(data)

    editor.preprocess, editor.accept_blobs = preprocess, accept_blobs  # type: ignore[method-assign]
    return editor


def _check_pixels(source: Any) -> None:
    height, width = image_size(source, "the image")
    if height * width > MOST_PIXELS:
        raise _message(f"The image must have at most {MOST_PIXELS} pixels, but has {width} x {height}.")


def _read(path: str | None) -> Image.Image:
    """An uploaded image."""
    if path is None:
        raise _message("There is no image. Choose one first.")
    try:
        _check_pixels(path)
        return read_image(path)
    except (OSError, TypeError, ValueError) as error:
        raise _message(str(error).replace(path, Path(path).name)) from error  # without the server's folders


def _check_call(prompt: Any, seed: Any, steps: Any) -> None:
    _check_text("prompt", prompt)
    if seed is None or not 0 <= seed <= LARGEST_SEED:
        raise _message(f"The seed must be a number from 0 to {LARGEST_SEED}, but is {seed}.")
    if steps is None or not 1 <= steps <= MOST_STEPS:
        raise _message(f"Steps must be from 1 to {MOST_STEPS}, but are {steps}.")


def _check_text(name: str, text: Any) -> None:
    if not isinstance(text, str):
        raise _message(f"The {name} must be text, but is of type {type(text).__name__}.")
    if not text.strip():
        raise _message(f"The {name} is empty. Write one.")
    if len(text) > MOST_CHARACTERS:
        raise _message(f"The {name} must have at most {MOST_CHARACTERS} characters, but has {len(text)}.")


def _message(text: str) -> gr.Error:
    """An error shown in a corner of the page, and not in the terminal."""
    return gr.Error(text, print_exception=False)


def _figures(results: list[Generated]) -> str:
    """The time and memory of each image, for under the slider."""
    cells = (f"<div><b>{r.precision}</b><br>{r.seconds:.2f} s, {r.megabytes:.1f} MB</div>" for r in results)
    return f'<div class="figures">{"".join(cells)}</div>'
