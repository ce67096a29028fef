"""Trains everything that is bundled at 256 px, from nothing and unattended, within a time budget.

    python -m examples.train_emoji.run --data outputs/emoji-256.zip --out outputs/bundled --minutes 1500

In turn: the three phases of the autoencoder, the transformer with its text encoder, the judge, the SANA-Sprint, the
ControlNet and the pixel-art LoRA; then all are judged. On a CPU the minutes are of one core. Everything is written as
it goes, each stage into its folder under OUT. Stop at any time: the same command goes on where it stopped. With a
larger budget it trains on.
"""

import json

import torch

from diffusers_sana import AutoencoderDC, SanaControlNetModel
from diffusers_sana.evaluation.emoji_probe import EmojiProbe

from . import autoencoder, controlnet, judge, lora, sprint, transformer
from .common import assemble, bundle_lora, device, load_pipeline, make_parser
from .scenes import Art
from .tokenizer import texts


SHARES = {"autoencoder": 0.4, "transformer": 0.4, "sprint": 0.12, "controlnet": 0.08}  # of the minutes
PARTS = (*SHARES, "judge", "lora")


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, "outputs/bundled", "folder of all stages", minutes=1500)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="only these; default: all in turn")
    args = parser.parse_args(argv)
    art, out = Art(args.data, device()), args.out
    minutes = {name: args.minutes * share for name, share in SHARES.items()}
    vae_folder, pipeline, judged = out / "autoencoder" / "phase_3" / "model", out / "pipeline", out / "judge"
    if "autoencoder" in args.parts:
        autoencoder.train_phases(art, out / "autoencoder", minutes["autoencoder"])
    if "transformer" in args.parts:
        vae = AutoencoderDC.from_pretrained(vae_folder, dtype=torch.float32).to(device())
        trained = transformer.train(art, vae, out, minutes["transformer"])
        assemble(trained, vae_folder, texts(art.objects), pipeline)
    if "judge" in args.parts:
        judge.main(["--data", str(args.data), "--vae", str(vae_folder), "--out", str(judged)])
    teacher = load_pipeline(str(pipeline)).to(device())
    probe = EmojiProbe.from_pretrained(judged).eval()
    if "sprint" in args.parts:
        run = out / "sprint"
        distilled = sprint.train(art, teacher, out / "latents.safetensors", run, minutes["sprint"])
        student = sprint.load_student(teacher, bundle_lora(distilled, run / "bundle"))
        print(json.dumps(sprint.judge(teacher, student, probe, art, run), indent=1))
    if "controlnet" in args.parts:
        folder = controlnet.train(art, teacher, out / "controlnet", minutes["controlnet"])
        trained_net = SanaControlNetModel.from_pretrained(folder, dtype=torch.float32)
        print(json.dumps(controlnet.judge(teacher, trained_net, art, out / "controlnet"), indent=1))
    if "lora" in args.parts:
        lora.main(["--data", str(args.data), "--model", str(pipeline), "--out", str(out / "lora")])


if __name__ == "__main__":
    main()
