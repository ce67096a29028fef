"""The page: a tab that generates images and a tab that answers questions. It loads nothing from other servers."""

from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from diffusers_sana.demo.comparison import Comparison, Generated
from diffusers_sana.images import image_size, read_image


THEME = gr.themes.Soft(primary_hue="teal", secondary_hue="teal", neutral_hue="slate", font=("system-ui", "sans-serif"))
CSS = """
.gradio-container { width: 100% !important; max-width: 1060px !important; margin: 0 auto; }
#images img, #image img { width: 100%; height: 100%; object-fit: contain; }
.figures { display: flex; justify-content: space-between; font-size: 0.95rem; }
.figures div { line-height: 1.5; }
.figures div:last-child { text-align: right; }
.figures b { font-size: 1.1rem; }
"""
PROMPTS = [
    "a panda on a yellow background",
    "a red apple on a blue background",
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
MOST_UPLOADED = "20mb"
MOST_PIXELS = 25_000_000  # of an uploaded image; a small file can contain a very large image


def build_page(comparison: Comparison, answerer: Any, title: str) -> gr.Blocks:
    """Builds the page; `serve` serves it.

    Args:
        comparison: generates the images.
        answerer: a `VilaUPipeline`.
        title: name of the generating model.
    """

    def generate(prompt: str, seed: int, steps: int, guidance: float, size: int, progress: Any = PROGRESS) -> tuple:
        """Generates an image in 16 and in 4 bits."""
        _check_text("prompt", prompt)
        if seed is None or not 0 <= seed <= LARGEST_SEED:
            raise _message(f"The seed must be a number from 0 to {LARGEST_SEED}, but is {seed}.")
        if steps is None or not 1 <= steps <= MOST_STEPS:
            raise _message(f"Steps must be from 1 to {MOST_STEPS}, but are {steps}.")
        if size is None:
            raise _message("No size is chosen. Choose one.")

        def on_step(precision: str, done: int) -> None:
            progress((done, steps), desc=precision, unit="steps")

        try:
            results = comparison.generate(prompt, seed, steps, guidance, comparison.sizes[size], on_step)
        except (TypeError, ValueError) as error:
            raise _message(str(error)) from error
        return tuple(result.image for result in results), _figures(results)

    def pass_on(images: tuple[Image.Image | None, ...] | None) -> tuple:
        """Passes the first image to the other tab."""
        if images is None or images[0] is None:
            raise _message("There is no image yet. Generate one first.")
        return images[0], gr.Tabs(selected="ask")

    def ask(path: str | None, question: str) -> str:
        """Answers a question about an image."""
        if path is None:
            raise _message("There is no image. Choose one first.")
        _check_text("question", question)
        try:
            height, width = image_size(path)
            if height * width > MOST_PIXELS:
                raise _message(f"The image must have at most {MOST_PIXELS} pixels, but has {width} x {height}.")
            return answerer.chat(read_image(path), question)
        except (OSError, TypeError, ValueError) as error:
            raise _message(str(error).replace(path, Path(path).name)) from error  # without the server's folders

    sizes = [(f"{width} x {height}", i) for i, (height, width) in enumerate(comparison.sizes)]
    with gr.Blocks(title="diffusers_sana", analytics_enabled=False) as page:
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
                    guidance = gr.Slider(1, 10, comparison.default_guidance, step=0.1, label="Guidance")
                    size = gr.Dropdown(sizes, value=0, label="Size", visible=len(sizes) > 1)
                    generate_button = gr.Button("Generate", variant="primary", elem_id="generate")
                    gr.Examples([[text] for text in PROMPTS], prompt, label="Prompts to try")
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
            with gr.Tab("Ask", id="ask"), gr.Row():
                with gr.Column(scale=5):
                    # As a path, so that nothing is decoded before `image_size` has read its size.
                    image = gr.Image(
                        type="filepath",
                        image_mode=None,
                        label="Image",
                        sources=["upload", "clipboard"],
                        height=380,
                        elem_id="image",
                    )
                with gr.Column(scale=6):
                    question = gr.Textbox(QUESTIONS[0], label="Question", elem_id="question")
                    ask_button = gr.Button("Ask", variant="primary", elem_id="ask")
                    answer = gr.Textbox(label="Answer", interactive=False, elem_id="answer")
                    gr.Examples([[text] for text in QUESTIONS], question, label="Questions to try")

        # One at a time: both need the whole device.
        turns = {"concurrency_id": "device", "concurrency_limit": 1}
        inputs = [prompt, seed, steps, guidance, size]
        gr.on(
            [generate_button.click, prompt.submit],
            generate,
            inputs,
            [slider, figures],
            show_progress_on=slider,
            **turns,
        )
        page.queue(max_size=MOST_WAITING)
        pass_button.click(pass_on, slider, [image, tabs])
        gr.on([ask_button.click, question.submit], ask, [image, question], answer, **turns)
    return page


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
        ssr_mode=False,
    )


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
