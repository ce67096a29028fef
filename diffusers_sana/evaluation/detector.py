"""Any object detector of transformers, with colors by CLIP, to check the images of full-size models."""

from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from diffusers_sana.evaluation.checks import Check, check_detectable
from diffusers_sana.evaluation.clip import Clip
from diffusers_sana.evaluation.images import to_images
from diffusers_sana.evaluation.observations import Detection, Observation


# Berlin and Kay's basic color terms; gray is left out, as in GenEval.
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")


class Detector:
    """Finds the objects that a check asks about.

    Args:
        model: folder or Hub id of an object detection model, closed or zero-shot, of transformers.
        clip: names the colors of objects; only checks that ask for colors need it.
        threshold: lowest score of an object that counts as found.
        zero_shot_template: the query for a class, for zero-shot models.
        device: where it runs.

    Raises:
        OSError: there is no such model.
        ValueError: the model is not a detector.
    """

    def __init__(
        self,
        model: str,
        clip: Clip | None = None,
        threshold: float = 0.3,
        zero_shot_template: str = "a photo of a {}",
        device: str = "cpu",
    ):
        from transformers import AutoConfig
        from transformers.models.auto import modeling_auto

        config = AutoConfig.from_pretrained(model)
        self.zero_shot = config.model_type in modeling_auto.MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES
        if not self.zero_shot and config.model_type not in modeling_auto.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES:
            raise ValueError(
                f"`model` must be an object detection model of transformers, {model} is a {config.model_type!r}; "
                "use for example facebook/detr-resnet-101 or google/owlv2-base-patch16-ensemble"
            )
        self.clip, self.threshold, self.template = clip, threshold, zero_shot_template
        self.find = _load(model, self.zero_shot, device)

    def check_labels(self, checks: list[Check]) -> None:
        """Raises a ValueError if checks ask for classes or colors that the models do not know."""
        check_detectable(checks, has_clip=self.clip is not None)
        if not self.zero_shot:
            known = set(self.find.model.config.id2label.values())
            missing = sorted({label for check in checks for label in check.labels} - known)
            if missing:
                raise ValueError(f"`checks` must ask for classes that the detector knows; it knows no {missing}")

    def observe(self, images: Tensor, checks: Sequence[Check]) -> list[Observation]:
        """What of its check's classes is in each image of `[N, 3, H, W]` in [0, 1]; with colors if asked for."""
        return [
            Observation(tuple(self._described(image, row, check) for row in self._rows(image, check)))
            for image, check in zip(to_images(images), checks, strict=True)
        ]

    def _rows(self, image: Image.Image, check: Check) -> list[dict[str, Any]]:
        if not self.zero_shot:
            return self.find(image, threshold=self.threshold)
        names = {self.template.format(label): label for label in check.labels}
        rows = self.find(image, candidate_labels=list(names), threshold=self.threshold)
        return [row | {"label": names[row["label"]]} for row in rows]

    def _described(self, image: Image.Image, row: dict[str, Any], check: Check) -> Detection:
        left, top, right, bottom = (row["box"][side] for side in ("xmin", "ymin", "xmax", "ymax"))
        color = None
        if self.clip and any(item.color and item.label == row["label"] for item in check.include):
            part = image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))
            color = COLORS[self.clip.choose(part, [f"a photo of a {color} {row['label']}" for color in COLORS])]
        box = (left / image.width, top / image.height, right / image.width, bottom / image.height)
        return Detection(row["label"], row["score"], box, color)


def _load(model: str, zero_shot: bool, device: str) -> Any:
    """The pipeline of transformers; with the image processor of PIL, which needs no torchvision."""
    from transformers import AutoImageProcessor, pipeline

    task: Any = "zero-shot-object-detection" if zero_shot else "object-detection"
    processor = AutoImageProcessor.from_pretrained(model, backend="pil")
    return pipeline(task, model=model, image_processor=processor, device=device)
