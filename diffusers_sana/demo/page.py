"""The page: a tab that draws and a tab that answers. Nothing in it comes from another server."""

from typing import Any

import gradio as gr
from PIL import Image

from diffusers_sana.demo.comparison import Comparison, Drawing
from diffusers_sana.images import read_image


THEME = gr.themes.Soft(primary_hue="teal", secondary_hue="teal", neutral_hue="slate", font=("system-ui", "sans-serif"))
CSS = """
.gradio-container { width: 100% !important; max-width: 1060px !important; margin: 0 auto; }
#pictures img, #picture img { width: 100%; height: 100%; object-fit: contain; }
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
LARGEST_SEED = 2**32 - 1
MOST_STEPS = 100  # a shared page is not to be kept busy for hours


def build_page(comparison: Comparison, answerer: Any, title: str) -> gr.Blocks:
    """The page, not yet served.

    Args:
        comparison: what draws.
        answerer: a `VilaUPipeline`.
        title: of the model that draws.
    """

    def draw(prompt: str, seed: int, steps: int, guidance: float, size: int, progress: Any = gr.Progress()) -> tuple:  # noqa: B008
        """Draws a prompt in 16 and in 4 bit."""
        if not prompt.strip():
            raise _message("The prompt is empty. Write what to draw.")
        if seed is None or not 0 <= seed <= LARGEST_SEED:
            raise _message(f"The seed must be a number from 0 to {LARGEST_SEED}, but is {seed}.")
        if steps is None or not 1 <= steps <= MOST_STEPS:
            raise _message(f"Steps must be from 1 to {MOST_STEPS}, but are {steps}.")

        def on_step(precision: str, done: int) -> None:
            progress((done, steps), desc=precision, unit="steps")

        try:
            drawings = comparison.draw(prompt, seed, steps, guidance, comparison.sizes[size], on_step)
        except (TypeError, ValueError) as error:
            raise _message(str(error)) from error
        return tuple(drawing.image for drawing in drawings), _figures(drawings)

    def pass_on(images: tuple[Image.Image | None, ...] | None) -> tuple:
        """Takes the first picture to the other tab."""
        if images is None or images[0] is None:
            raise _message("There is no picture yet. Draw one first.")
        return images[0], gr.Tabs(selected="ask")

    def ask(image: str | None, question: str) -> str:
        """Answers a question about a picture."""
        if image is None:
            raise _message("There is no picture. Choose one first.")
        if not question.strip():
            raise _message("The question is empty. Write what to answer.")
        try:
            return answerer.chat(read_image(image), question)
        except ValueError as error:
            raise _message(str(error)) from error

    sizes = [(f"{width} x {height}", i) for i, (height, width) in enumerate(comparison.sizes)]
    with gr.Blocks(title="diffusers_sana", analytics_enabled=False) as page:
        gr.Markdown(f"# diffusers_sana\nThe same seed in two precisions: **{title}** as it is and in 4 bits.")
        with gr.Tabs() as tabs:
            with gr.Tab("Draw", id="draw"), gr.Row():
                with gr.Column(scale=5):
                    prompt = gr.Textbox(PROMPTS[0], label="Prompt", lines=1, elem_id="prompt")
                    with gr.Row():
                        seed = gr.Number(0, label="Seed", precision=0, min_width=90, elem_id="seed")
                        steps = gr.Number(
                            comparison.default_steps, label="Steps", precision=0, min_width=90, elem_id="steps"
                        )
                    guidance = gr.Slider(1, 10, comparison.default_guidance, step=0.1, label="Guidance")
                    size = gr.Dropdown(sizes, value=0, label="Size", visible=len(sizes) > 1)
                    draw_button = gr.Button("Draw", variant="primary", elem_id="draw")
                    gr.Examples([[text] for text in PROMPTS], prompt, label="Prompts to try")
                with gr.Column(scale=6):
                    slider = gr.ImageSlider(
                        type="pil",
                        format="png",  # without loss: equal pictures are equal files
                        label=" | ".join(comparison.pipes),
                        height=440,
                        interactive=False,
                        elem_id="pictures",
                    )
                    figures = gr.HTML(elem_id="figures")
                    pass_button = gr.Button("Ask about this picture", size="sm", elem_id="pass")
            with gr.Tab("Ask", id="ask"), gr.Row():
                with gr.Column(scale=5):
                    picture = gr.Image(
                        type="filepath",
                        label="Picture",
                        sources=["upload", "clipboard"],
                        height=380,
                        elem_id="picture",
                    )
                with gr.Column(scale=6):
                    question = gr.Textbox(QUESTIONS[0], label="Question", elem_id="question")
                    ask_button = gr.Button("Ask", variant="primary", elem_id="ask")
                    answer = gr.Textbox(label="Answer", interactive=False, elem_id="answer")
                    gr.Examples([[text] for text in QUESTIONS], question, label="Questions to try")

        # One at a time: both want the whole device.
        turns = {"concurrency_id": "device", "concurrency_limit": 1}
        inputs = [prompt, seed, steps, guidance, size]
        gr.on([draw_button.click, prompt.submit], draw, inputs, [slider, figures], show_progress_on=slider, **turns)
        pass_button.click(pass_on, slider, [picture, tabs])
        gr.on([ask_button.click, question.submit], ask, [picture, question], answer, **turns)
    return page


def serve(page: gr.Blocks, port: int | None = None, share: bool = False) -> None:
    """Serves the page until Ctrl-C.

    Args:
        page: from `build_page`.
        port: of this machine; None for the first free one from 7860.
        share: also serve it on an address that anyone can reach, by Gradio's servers.
    """
    page.launch(
        server_port=port,
        share=share,
        theme=THEME,
        css=CSS,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
    )


def _message(text: str) -> gr.Error:
    """Shown in a corner of the page; nothing in the terminal, as it is nothing that went wrong there."""
    return gr.Error(text, print_exception=False)


def _figures(drawings: list[Drawing]) -> str:
    """Under each side of the slider, what the picture there took."""
    cells = (f"<div><b>{d.precision}</b><br>{d.seconds:.2f} s, {d.megabytes:.1f} MB</div>" for d in drawings)
    return f'<div class="figures">{"".join(cells)}</div>'
