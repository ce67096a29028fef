"""Components of pipelines: from folders, which may name diffusers' classes, and from other pipelines."""

import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from diffusers_sana._compat import private
from diffusers_sana._entries import PACKAGE, UPSTREAM_NAMES
from diffusers_sana.checkpoint_files import check_readable, read_object
from diffusers_sana.saving import check_components


_OURS = {("diffusers", theirs): (PACKAGE, ours) for ours, theirs in UPSTREAM_NAMES.items()}
# LongSANA's folders on the Hub name a class that no released diffusers has. Its weights and config are those of ours.
CAUSAL_TRANSFORMER = "SanaVideoCausalTransformer3DModel"
_OURS["diffusers", CAUSAL_TRANSFORMER] = _OURS["diffusers", "SanaVideoTransformer3DModel"]

# Activations of these exceed float16: the language model's hidden states, and up to 2.7e6 in the decoder of DC-AE.
# bfloat16 has the range of float32; processors without it compute in float32 (`kernels/precision.py`).
OVERFLOW_FLOAT16 = ("text_encoder", "vae")

# diffusers' solver, which ours replaces for flows, and the file with its config.
SOLVER = ("diffusers", UPSTREAM_NAMES["FlowDPMSolverScheduler"])
SOLVER_CONFIG = "scheduler_config.json"

# Whether our own `from_pretrained` is loading, which knows for which components float16 was asked by name.
_is_chosen: ContextVar[bool] = ContextVar("the dtype of each component is chosen", default=False)


class ComponentLoading(DiffusionPipeline):
    """Part of `SanaPipelineBase`: loads our classes in place of diffusers' and saves diffusers' names for ours.

    A solver for something else than a flow stays diffusers'. Where float16 is asked for the whole pipeline, the
    components in `OVERFLOW_FLOAT16` get bfloat16.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Self:
        """Loads a pipeline from a folder or the Hub; all arguments are those of `DiffusionPipeline.from_pretrained`.

        `dtype=torch.float16` leaves the text encoder and the autoencoder in bfloat16, because they overflow float16.
        `dtype={"default": torch.float16, "vae": torch.float16}` and `pipe.vae.to(torch.float16)` are followed.

        Raises:
            OSError: naming the file of a local folder that is missing or damaged.
            ValueError: for an argument or a component that does not belong to this pipeline.
        """
        folder = Path(pretrained_model_name_or_path)
        if folder.is_dir():
            check_complete(folder, private(cls, "_get_init_keys")(cls) - kwargs.keys())
        kwargs |= {name: _dtypes(kwargs[name]) for name in ("dtype", "torch_dtype") if name in kwargs}
        token = _is_chosen.set(True)
        try:
            with naming_damaged_files(folder):
                return super().from_pretrained(str(pretrained_model_name_or_path), **kwargs)
        finally:
            _is_chosen.reset(token)

    @classmethod
    def how_to_load(
        cls, name: str, library_name: str, class_name: str, cached_folder: str | os.PathLike, dtype: torch.dtype | None
    ) -> dict[str, Any]:
        """Class and dtype with which `DiffusionPipeline.from_pretrained` loads a component.

        Args:
            name: of the component.
            library_name, class_name: its class, from `extract_init_dict`.
            cached_folder: of the pipeline.
            dtype: asked for, for the whole pipeline or for this component: there is no telling. float16 is taken to be
                asked for the whole pipeline.

        Returns:
            Those of the arguments that change.
        """
        chosen: dict[str, Any] = {}
        if dtype is torch.float16 and not _is_chosen.get() and name in OVERFLOW_FLOAT16:
            chosen["dtype"] = torch.bfloat16
        if (library_name, class_name) == _OURS[SOLVER] and predicts_noise(Path(cached_folder, name, SOLVER_CONFIG)):
            chosen |= zip(("library_name", "class_name"), SOLVER, strict=True)
        return chosen

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """Reads `model_index.json`; where it names a diffusers class that one of ours replaces, ours is loaded.

        Raises:
            ValueError: for components and arguments of `from_pretrained` that this pipeline does not know.
        """
        config_dict = {
            name: _OURS.get(tuple(value), value) if isinstance(value, list) else value
            for name, value in config_dict.items()
        }
        init_dict, unknown, hidden = super().extract_init_dict(config_dict, **kwargs)
        if unknown:
            known = sorted(private(cls, "_get_init_keys")(cls) - {"self"})
            raise ValueError(
                f"`{'`, `'.join(unknown)}`: neither a component of {cls.__name__} nor an argument of"
                f" `from_pretrained`. The components are {known}."
            )
        return init_dict, unknown, hidden

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Writes a folder; the arguments are those of diffusers.

        Raises:
            ValueError: adapters are beside the layers of a component. Nothing is written then.
        """
        check_components(self)
        super().save_pretrained(save_directory, *args, **kwargs)

    def register_to_config(self, **kwargs: Any) -> None:
        """Records a component of ours under the name of the diffusers class it replaces: see `save_pretrained`."""
        for name, value in kwargs.items():
            if isinstance(value, tuple) and str(value[0]).split(".")[0] == PACKAGE and value[1] in UPSTREAM_NAMES:
                kwargs[name] = ("diffusers", UPSTREAM_NAMES[value[1]])
        super().register_to_config(**kwargs)

    @property
    def components(self) -> dict[str, Any]:
        """The components by name, without optional ones that are not there, which diffusers' pipelines do not know."""
        optional = self._optional_components
        found = super().components
        return {name: part for name, part in found.items() if part is not None or name not in optional}

    def to_json_string(self) -> str:
        """What `model_index.json` says, without optional components that are not there: diffusers warns of them."""
        config = json.loads(super().to_json_string())
        absent = [name for name in self._optional_components if config.get(name) == [None, None]]
        return json.dumps({k: v for k, v in config.items() if k not in absent}, indent=2, sort_keys=True) + "\n"

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Moves and casts the components as `DiffusionPipeline.to` does.

        float16 leaves the text encoder and the autoencoder in bfloat16, because they overflow it.
        `pipe.vae.to(torch.float16)` is followed.
        """
        if torch.float16 not in (*args, kwargs.get("dtype")):
            return super().to(*args, **kwargs)
        others = self.components.keys() - OVERFLOW_FLOAT16
        with self._without(OVERFLOW_FLOAT16):
            super().to(*args, **kwargs)
        args = tuple(torch.bfloat16 if value is torch.float16 else value for value in args)
        kwargs |= {"dtype": torch.bfloat16} if "dtype" in kwargs else {}
        with self._without(others):
            return super().to(*args, **kwargs)

    @contextmanager
    def _without(self, names: Collection[str]) -> Iterator[None]:
        """For the time of the block, the components `names` are None; the config still has them."""
        parts = {name: vars(self)[name] for name in names}
        vars(self).update(dict.fromkeys(names))
        try:
            yield
        finally:
            vars(self).update(parts)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Self:
        """A pipeline of this class around the components of another, as they are: nothing is copied, moved or cast.

        diffusers' method casts all components to `dtype`, by default to fp32.

        Args:
            pipeline: has the components, whichever package it comes from.
            kwargs: components in place of the pipeline's, or that it lacks; `dtype` (or `torch_dtype`) casts all.

        Raises:
            ValueError: for an argument that is no component, and for a component that neither has.
        """
        dtype: torch.dtype | None = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
        names, _ = private(cls, "_get_signature_keys")(cls)
        if unknown := sorted(kwargs.keys() - names):
            raise ValueError(f"`{'`, `'.join(unknown)}`: no component of {cls.__name__}, which has {sorted(names)}.")
        components = {name: part for name, part in pipeline.components.items() if name in names} | kwargs
        if missing := sorted(names - components.keys() - set(cls._optional_components)):
            raise ValueError(
                f"{cls.__name__} also needs `{'`, `'.join(missing)}`, which {type(pipeline).__name__} lacks. Pass"
                f" `from_pipe(pipeline, {missing[0]}=...)`."
            )
        made = cls(**components)
        if path := pipeline.config.get("_name_or_path"):
            made.register_to_config(_name_or_path=path)
        made.set_progress_bar_config(**getattr(pipeline, "_progress_bar_config", {}))
        return made if dtype is None else made.to(dtype=dtype)


def _dtypes(dtype: Any) -> Any:
    """The argument `dtype` of `from_pretrained`: where all components are to have float16, some get bfloat16."""
    by_component = {"default": dtype} if dtype is torch.float16 else dtype
    if isinstance(by_component, dict) and by_component.get("default") is torch.float16:
        return dict.fromkeys(OVERFLOW_FLOAT16, torch.bfloat16) | by_component
    return dtype


def predicts_noise(file: Path) -> bool:
    """Whether a config is that of a solver for something else than a flow, which ours refuses.

    One with the noise levels of a flow contradicts itself: ours is loaded, and says so.

    Raises:
        OSError: naming the file, if it is damaged.
    """
    if not file.is_file():
        return False
    config = read_object(file)
    # Where diffusers' solver is not told, it takes the prediction for noise.
    default = "epsilon" if config.get("_class_name") == SOLVER[1] else "flow_prediction"
    return config.get("prediction_type", default) != "flow_prediction" and not config.get("use_flow_sigmas")


@contextmanager
def naming_damaged_files(folder: Path) -> Iterator[None]:
    """Where loading from `folder` fails in the block because a file is damaged, raises an error with its name."""
    try:
        yield
    except (ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:
        check_readable(folder)  # most errors lack the name
        raise


def check_complete(folder: Path, components: Collection[str]) -> None:
    """Raises where the local pipeline `folder` lacks a file.

    transformers loads a tokenizer without a vocabulary from a folder that lacks `tokenizer.json`.

    Args:
        folder: has a `model_index.json`.
        components: those that are to be loaded from it.

    Raises:
        OSError: naming the missing file, or an index that is damaged.
    """
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise OSError(f"{index_file} is missing. Is `{folder}` the folder of a pipeline?")
    for name, value in read_object(index_file).items():
        if name not in components:
            continue
        if not isinstance(value, list) or len(value) != 2:
            raise OSError(f"{index_file} must give library and class of `{name}`, got {value!r}. Download it again.")
        if value[0] is None:
            continue
        component = folder / name
        if name == "tokenizer":
            _require_one_of(component, "tokenizer.json", "tokenizer.model")
        elif name == "processor":
            check_processor(component)
        elif name == "scheduler":
            _require_one_of(component, SOLVER_CONFIG)
        elif name == "feature_extractor":
            _require_one_of(component, "preprocessor_config.json")
        else:
            _require_one_of(component, "config.json")
            if all(file.suffix == ".json" for file in component.iterdir()):
                raise OSError(f"{component} has no file of weights, such as *.safetensors. Download it again.")


def check_processor(folder: Path) -> None:
    """Raises where the local `folder` lacks a file of its processor.

    Raises:
        OSError: naming the missing file.
    """
    _require_one_of(folder, "processor_config.json", component="processor")
    _require_one_of(folder, "tokenizer.json", "tokenizer.model", component="processor")


def _require_one_of(folder: Path, *names: str, component: str | None = None) -> None:
    if not any((folder / name).is_file() for name in names):
        component = component or folder.name
        raise OSError(f"{folder / names[0]} is missing. Download it again, or pass `{component}` yourself.")
