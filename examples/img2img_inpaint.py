"""Change an image, and repaint a part of it, with the bundled checkpoint, on a CPU.

    python examples/img2img_inpaint.py --out img2img_inpaint.png

Upper row, image to image: the image, and "a pear" from it at growing strength; at 1 nothing of it is left.
Lower row, inpainting: the image, the mask, "a lemon" under it; the same with the pixels around it as the autoencoder
returns them; and half of the image under another mask.
"""

from pathlib import Path

from PIL import Image, ImageDraw

from diffusers_sana.arguments import ArgumentParser


SIDE, GAP = 256, 8
STRENGTHS = (0.2, 0.4, 0.6, 1.0)


def mask(box: tuple[int, int, int, int]) -> Image.Image:
    """White in `box` (left, top, right, bottom), in pixels: the part to repaint."""
    image = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(image).rectangle(box, fill=255)
    return image


def generate() -> list[list[Image.Image]]:
    """The rows of images."""
    import torch

    from diffusers_sana import SANA_EMOJI, SanaImg2ImgPipeline, SanaInpaintPipeline, SanaPipeline

    pipe = SanaPipeline.from_pretrained(SANA_EMOJI)
    img2img = SanaImg2ImgPipeline.from_pipe(pipe)
    inpaint = SanaInpaintPipeline.from_pipe(pipe)

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    apple = pipe("an apple on a blue background", generator=seeded()).images[0]
    prompt = "a pear on a blue background"
    changed = [img2img(prompt, apple, strength=s, generator=seeded()).images[0] for s in STRENGTHS]

    prompt, middle, half = "a lemon on a blue background", mask((32, 32, 223, 223)), mask((128, 0, 255, 255))
    lemon = inpaint(prompt, apple, middle, generator=seeded()).images[0]
    unkept = inpaint(prompt, apple, middle, preserve_unmasked=False, generator=seeded()).images[0]
    halves = inpaint(prompt, apple, half, generator=seeded()).images[0]
    return [[apple, *changed], [apple, middle, lemon, unkept, halves]]


def sheet(rows: list[list[Image.Image]]) -> Image.Image:
    """The rows as one image."""
    step = SIDE + GAP
    whole = Image.new("RGB", (len(rows[0]) * step - GAP, len(rows) * step - GAP), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            whole.paste(image, (x * step, y * step))
    return whole


def main() -> None:
    """The command line: where to write the image."""
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("img2img_inpaint.png"), help="the file to write")
    out = parser.parse_args().out
    sheet(generate()).save(out, optimize=True)
    print(out)


if __name__ == "__main__":
    main()
