"""Entries in the tables of the hosts: made once, taken back exactly, never in place of somebody else's."""

import importlib.util
import json
import logging
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import transformers.quantizers.auto
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.pipelines import pipeline_loading_utils, pipeline_utils
from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

import diffusers_sana
from diffusers_sana import _entries, _registration
from diffusers_sana.models.transformers.transformer_sana import SanaTransformerBlock
from tests import tiny


TABLES = (
    LOADABLE_CLASSES,
    AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
    TransformerBlockRegistry._registry,
    diffusers.quantizers.auto.AUTO_QUANTIZER_MAPPING,
    diffusers.quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING,
    transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING,
    transformers.quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING,
)


@pytest.fixture(autouse=True)
def _registered_afterwards():
    yield
    diffusers_sana.unregister()
    diffusers_sana.register()


def contents():
    return [list(table.items()) for table in TABLES]


def test_registered_by_the_import():
    assert list(LOADABLE_CLASSES["diffusers_sana"]) == ["ModelMixin", "SchedulerMixin", "DiffusionPipeline"]
    assert next(iter(AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values())) is diffusers_sana.SanaPipeline
    assert TransformerBlockRegistry.get(SanaTransformerBlock).return_hidden_states_index == 0
    of_diffusers, config, of_transformers, same_config = (table["svdquant"] for table in TABLES[3:])
    assert config is same_config is diffusers_sana.SVDQuantConfig
    assert issubclass(of_diffusers, diffusers.quantizers.DiffusersQuantizer)
    assert issubclass(of_transformers, transformers.quantizers.HfQuantizer)
    assert config.quant_method == "svdquant"


def test_twice_is_once():
    once, finders = contents(), list(sys.meta_path)
    diffusers_sana.register()
    diffusers_sana.register(strict=True)
    assert contents() == once
    assert sys.meta_path == finders


def test_unregister_restores():
    registered = contents()
    diffusers_sana.unregister()
    added = [len(a) - len(b) for a, b in zip(registered, contents(), strict=True)]
    assert added == [sum(_registration._table(entry) is table for entry in _registration.ENTRIES) for table in TABLES]
    assert not any("diffusers_sana" in str(item) for table in contents() for item in table)
    assert _registration._finder not in sys.meta_path
    diffusers_sana.unregister()
    diffusers_sana.register()
    assert sorted(map(str, contents()[0])) == sorted(map(str, registered[0]))
    assert contents()[1] == registered[1]  # in front again


def test_third_party_entry_stays(caplog):
    diffusers_sana.unregister()
    third_party = type("ThirdPartyPipeline", (), {})
    AUTO_TEXT2IMAGE_PIPELINES_MAPPING["diffusers_sana"] = third_party
    try:
        with caplog.at_level(logging.WARNING, logger="diffusers_sana._registration"):
            diffusers_sana.register()
            diffusers_sana.register()
        assert len(caplog.records) == 1
        assert "ThirdPartyPipeline" in caplog.text
        assert "diffusers_sana.pipelines.pipeline_sana.SanaPipeline" in caplog.text
        assert "diffusers_sana" in LOADABLE_CLASSES  # the others are made

        diffusers_sana.unregister()
        before = contents()
        with pytest.raises(RuntimeError, match=r"auto_pipeline.*ThirdPartyPipeline.*SanaPipeline"):
            diffusers_sana.register(strict=True)
        assert contents() == before
        assert AUTO_TEXT2IMAGE_PIPELINES_MAPPING["diffusers_sana"] is third_party
    finally:
        del AUTO_TEXT2IMAGE_PIPELINES_MAPPING["diffusers_sana"]


def test_entry_that_somebody_replaced_stays():
    LOADABLE_CLASSES["diffusers_sana"] = {"ModelMixin": ["save", "load"]}
    diffusers_sana.unregister()
    assert LOADABLE_CLASSES.pop("diffusers_sana") == {"ModelMixin": ["save", "load"]}


class TestHostsImportedLater:
    """With a host of our own making; `test_import.py` has the real ones."""

    @pytest.fixture
    def host(self, tmp_path, monkeypatch):
        diffusers_sana.unregister()
        monkeypatch.syspath_prepend(tmp_path)
        name = "a_host_for_entries"
        (tmp_path / f"{name}.py").write_text("from collections import OrderedDict\nTABLE = OrderedDict(theirs=1)\n")
        yield name
        sys.modules.pop(name, None)

    def entries(self, monkeypatch, *entries):
        monkeypatch.setattr(_registration, "ENTRIES", entries)
        diffusers_sana.register()

    def test_entry_waits_for_the_host(self, host, monkeypatch):
        entry = _registration.Entry(
            "a feature", host=host, table="TABLE", key=lambda: "ours", value=lambda: 2, first=True
        )
        self.entries(monkeypatch, entry)
        assert host not in sys.modules
        module = importlib.import_module(host)
        assert list(module.TABLE.items()) == [("ours", 2), ("theirs", 1)]
        assert type(module.__spec__.loader) is type(module.__loader__) is importlib.machinery.SourceFileLoader
        diffusers_sana.unregister()
        assert list(module.TABLE.items()) == [("theirs", 1)]

    def test_entry_after_another_module(self, host, monkeypatch):
        self.entries(
            monkeypatch,
            _registration.Entry(
                "a feature", host="sys", table="modules", key=lambda: "never", value=lambda: 2, after=host
            ),
        )
        assert "never" not in sys.modules
        importlib.import_module(host)
        assert sys.modules["never"] == 2
        diffusers_sana.unregister()
        assert "never" not in sys.modules

    def test_entry_whose_making_imports_another_host(self, host, monkeypatch):
        """That host's entry waits: its value may need what is being imported."""
        order = []

        def value():
            importlib.import_module("another_host_for_entries")
            order.append("first")
            return 1

        (Path(sys.path[0]) / "another_host_for_entries.py").write_text("TABLE = {}\n")
        try:
            self.entries(
                monkeypatch,
                _registration.Entry("a feature", host=host, table="TABLE", key=lambda: "ours", value=value),
                _registration.Entry(
                    "a feature",
                    host="another_host_for_entries",
                    table="TABLE",
                    key=lambda: "ours",
                    value=lambda: order.append("second") or 2,
                ),
            )
            assert importlib.import_module(host).TABLE["ours"] == 1
            assert order == ["first", "second"]
            assert sys.modules["another_host_for_entries"].TABLE == {"ours": 2}
        finally:
            sys.modules.pop("another_host_for_entries", None)

    def test_unregister_stops_waiting(self, host, monkeypatch):
        self.entries(
            monkeypatch,
            _registration.Entry("a feature", host=host, table="TABLE", key=lambda: "ours", value=lambda: 2),
        )
        diffusers_sana.unregister()
        assert list(importlib.import_module(host).TABLE.items()) == [("theirs", 1)]

    def test_strict_imports_the_host(self, host, monkeypatch):
        self.entries(
            monkeypatch,
            _registration.Entry("a feature", host=host, table="TABLE", key=lambda: "ours", value=lambda: 2),
        )
        diffusers_sana.register(strict=True)
        assert sys.modules[host].TABLE["ours"] == 2

    def test_table_that_has_moved(self, host, monkeypatch, caplog):
        entry = _registration.Entry("a feature", host=host, table="MOVED", key=lambda: "ours", value=lambda: 2)
        self.entries(monkeypatch, entry)
        with caplog.at_level(logging.WARNING, logger="diffusers_sana._registration"):
            importlib.import_module(host)
        assert f"cannot register in {host}.MOVED" in caplog.text
        with pytest.raises(RuntimeError, match="MOVED"):
            diffusers_sana.register(strict=True)

    def test_entry_that_fails_costs_its_feature_only(self, host, monkeypatch, caplog):
        def fail():
            raise ZeroDivisionError("an error of ours")

        (Path(sys.path[0]) / f"{host}.py").write_text("TABLE = {}\nLIST = []\n")
        self.entries(
            monkeypatch,
            _registration.Entry("broken value", host, "TABLE", key=lambda: "a", value=fail),
            _registration.Entry("broken value", host, "TABLE", key=lambda: "b", value=fail),
            _registration.Entry("broken key", host, "TABLE", key=fail, value=lambda: 1),
            _registration.Entry("no ordered table", host, "TABLE", lambda: "c", value=lambda: 2, first=True),
            _registration.Entry("no table", host, "LIST", lambda: "d", value=lambda: 3),
            _registration.Entry("fine", host, "TABLE", lambda: "e", value=lambda: 4),
        )
        with caplog.at_level(logging.WARNING, logger="diffusers_sana._registration"):
            assert importlib.import_module(host).TABLE == {"e": 4}
            diffusers_sana.register()
        assert [record.getMessage().split(":")[0] for record in caplog.records] == [
            f"diffusers_sana leaves out {feature}"
            for feature in ("broken value", "broken key", "no ordered table", "no table")
        ]
        assert "ZeroDivisionError: an error of ours" in caplog.text
        with pytest.raises(
            RuntimeError, match=r"leaves out broken value: ZeroDivisionError.*; .*leaves out broken key"
        ):
            diffusers_sana.register(strict=True)
        diffusers_sana.unregister()
        assert sys.modules[host].TABLE == {}

    def test_loader_answers_for_the_one_it_stands_for(self, host, monkeypatch):
        self.entries(monkeypatch, _registration.Entry("a feature", host, "TABLE", lambda: "ours", value=lambda: 2))
        spec = importlib.util.find_spec(host)
        assert spec.loader.get_filename(host) == spec.origin
        assert spec.loader.get_source(host).startswith("from collections")


class TestGuestModules:
    """Modules of a host in which it finds our classes."""

    @pytest.fixture
    def guest(self, tmp_path, monkeypatch):
        (tmp_path / "a_host_with_guests").mkdir()
        (tmp_path / "a_host_with_guests/__init__.py").write_text("")
        (tmp_path / "a_host_with_guests/its_own.py").write_text("Thing = 1\n")
        (tmp_path / "our_part.py").write_text("raise ImportError('our_part is broken')\n")
        monkeypatch.syspath_prepend(tmp_path)
        guests = {
            "a_host_with_guests.guest": "diffusers_sana.checkpoints",
            "a_host_with_guests.its_own": "diffusers_sana.checkpoints",
            "a_host_with_guests.broken": "our_part",
        }
        monkeypatch.setattr(_registration, "GUEST_MODULES", guests)
        yield "a_host_with_guests"
        diffusers_sana.unregister()
        for name in [name for name in sys.modules if name.startswith("a_host_with_guests")]:
            del sys.modules[name]

    def test_looks_names_up_in_ours(self, guest):
        module = importlib.import_module(f"{guest}.guest")
        assert module.SANA_EMOJI is diffusers_sana.checkpoints.SANA_EMOJI
        with pytest.raises(AttributeError, match=r"'a_host_with_guests\.guest' has no attribute 'Nothing'"):
            _ = module.Nothing
        assert diffusers_sana.checkpoints.__spec__.name == "diffusers_sana.checkpoints"  # which stays as it was
        diffusers_sana.unregister()
        assert f"{guest}.guest" not in sys.modules
        assert not hasattr(sys.modules[guest], "guest")
        with pytest.raises(ModuleNotFoundError, match="guest"):
            importlib.import_module(f"{guest}.guest")

    def test_own_module_of_the_host_goes_first(self, guest):
        assert importlib.import_module(f"{guest}.its_own").Thing == 1

    def test_class_that_cannot_be_imported(self, guest, caplog):
        """Hosts list the classes of all models: only using one may fail."""
        module = importlib.import_module(f"{guest}.broken")
        with caplog.at_level(logging.WARNING, logger="diffusers_sana._registration"):
            cls = module.Thing
            assert module.Thing is cls
        assert len(caplog.records) == 1
        assert "Thing of diffusers_sana cannot be imported: ImportError: our_part is broken" in caplog.text
        assert cls.__name__ == "Thing"
        assert {cls: 1}[cls] == 1
        for use in (lambda: cls.from_pretrained, cls, lambda: cls(1)):
            with pytest.raises(ImportError, match="our_part is broken"):
                use()


class TestLoading:
    @pytest.fixture
    def folder(self, tmp_path):
        """Names our classes by our name, as the folder of a pipeline of another package might."""
        tiny.write_official_folder(tmp_path)
        file = tmp_path / "model_index.json"
        index = json.loads(file.read_text())
        index |= {
            "transformer": ["diffusers_sana", "SanaTransformer2DModel"],
            "vae": ["diffusers_sana", "AutoencoderDC"],
        }
        file.write_text(json.dumps(index | {"scheduler": ["diffusers_sana", "FlowDPMSolverScheduler"]}))
        return tmp_path

    @pytest.mark.parametrize("auto", [diffusers.AutoPipelineForText2Image, diffusers_sana.SanaPipeline])
    def test_our_pipeline(self, folder, auto):
        pipe = auto.from_pretrained(folder)
        assert type(pipe) is diffusers_sana.SanaPipeline
        assert type(pipe.transformer) is diffusers_sana.SanaTransformer2DModel

    def test_their_pipeline_with_our_components(self, folder):
        """Whoever names diffusers' class gets it."""
        pipe = diffusers.SanaPipeline.from_pretrained(folder)
        assert type(pipe) is diffusers.SanaPipeline
        assert type(pipe.transformer) is diffusers_sana.SanaTransformer2DModel
        assert type(pipe.vae) is diffusers_sana.AutoencoderDC
        assert type(pipe.scheduler) is diffusers_sana.FlowDPMSolverScheduler
        pipe.save_pretrained(folder / "copy")
        index = json.loads((folder / "copy/model_index.json").read_text())
        assert index["transformer"] == ["diffusers_sana", "SanaTransformer2DModel"]

    def test_whoever_names_no_class_gets_ours(self, tmp_path, caplog):
        """`DiffusionPipeline` is where a folder says which pipeline; said once, and no more after `unregister`."""
        tiny.write_official_folder(tmp_path)
        _entries._log_choice.cache_clear()
        with caplog.at_level("INFO"):
            for _ in range(2):
                pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
                assert type(pipe) is diffusers_sana.SanaPipeline
                assert type(pipe.transformer) is diffusers_sana.SanaTransformer2DModel
        assert (
            caplog.text.count("loads diffusers_sana.SanaPipeline; diffusers.SanaPipeline.from_pretrained loads") == 1
        )
        assert type(diffusers.SanaPipeline.from_pretrained(tmp_path)) is diffusers.SanaPipeline
        assert diffusers.SanaPipeline.__module__.startswith("diffusers.")
        diffusers_sana.unregister()
        assert type(diffusers.DiffusionPipeline.from_pretrained(tmp_path)) is diffusers.SanaPipeline

    def test_what_diffusers_asks_is_put_back(self):
        diffusers_sana.unregister()
        plain = pipeline_utils._get_pipeline_class
        assert plain is pipeline_loading_utils._get_pipeline_class
        diffusers_sana.register()
        ours = pipeline_utils._get_pipeline_class
        assert ours is not plain
        diffusers_sana.register()
        assert pipeline_utils._get_pipeline_class is ours
        config = {"_class_name": "StableDiffusionPipeline"}
        for chosen, expected in (
            (ours(diffusers.DiffusionPipeline, config=config), diffusers.StableDiffusionPipeline),
            (ours(diffusers.SanaPAGPipeline, config=config), diffusers.SanaPAGPipeline),
            (ours(diffusers.DiffusionPipeline, {"_class_name": "SanaPAGPipeline"}), diffusers_sana.SanaPAGPipeline),
        ):
            assert chosen is expected
        diffusers_sana.unregister()
        assert pipeline_utils._get_pipeline_class is plain

    def test_loading_of_components_is_put_back_and_left_alone_where_it_has_changed(self, monkeypatch, caplog):
        diffusers_sana.unregister()
        plain = pipeline_utils.load_sub_model
        assert plain is pipeline_loading_utils.load_sub_model
        diffusers_sana.register()
        assert pipeline_utils.load_sub_model.__wrapped__ is plain
        diffusers_sana.unregister()
        assert pipeline_utils.load_sub_model is plain

        def of_another_version(name, pipeline_class, torch_dtype):
            raise NotImplementedError

        monkeypatch.setattr(pipeline_utils, "load_sub_model", of_another_version)
        with caplog.at_level(logging.WARNING, logger="diffusers_sana._registration"):
            diffusers_sana.register()
        assert pipeline_utils.load_sub_model is of_another_version
        assert "predict noise for DiffusionPipeline.from_pretrained: TypeError: `of_another" in caplog.text
        diffusers_sana.unregister()

    def test_the_gate_of_the_hub(self, folder):
        """What `from_pretrained` asks of a repository before it downloads from it."""
        config = json.loads((folder / "model_index.json").read_text())
        files = {str(file.relative_to(folder)) for file in folder.rglob("*")}
        ask = pipeline_loading_utils._get_custom_components_and_folders
        custom, folders = ask("some/repo", config, files)
        assert custom == {}
        assert "transformer" in folders
        diffusers_sana.unregister()
        with pytest.raises(ValueError, match="diffusers_sana"):
            ask("some/repo", config, files)

    def test_auto_pipeline_from_pipe(self):
        theirs = tiny.pipeline(diffusers)
        assert type(diffusers.AutoPipelineForText2Image.from_pipe(theirs)) is diffusers_sana.SanaPipeline

    def test_auto_pipeline_with_perturbed_attention(self, folder):
        auto = diffusers.AutoPipelineForText2Image
        pipe = auto.from_pretrained(folder, enable_pag=True, pag_applied_layers=["transformer_blocks.1"])
        assert type(pipe) is diffusers_sana.SanaPAGPipeline
        plain = auto.from_pipe(pipe, enable_pag=False)
        assert type(plain) is diffusers_sana.SanaPipeline
        assert type(auto.from_pipe(plain, enable_pag=True)) is diffusers_sana.SanaPAGPipeline

    def test_auto_pipeline_is_theirs_again(self, folder):
        diffusers_sana.unregister()
        pipe = diffusers.AutoPipelineForText2Image.from_pretrained(folder)
        assert type(pipe) is diffusers.SanaPipeline


@pytest.mark.parametrize(
    "statement",
    [
        "import diffusers, diffusers_sana.quantizers.svdquant.targets",
        "import diffusers_sana; from transformers import Gemma2Model",
    ],
)
def test_quantizers_in_any_order_of_imports(statement):
    """The hosts' import makes our entries, whose classes import the hosts."""
    check = """
import diffusers.quantizers.auto as ours, transformers.quantizers.auto as theirs
for host in (ours, theirs):
    assert "svdquant" in host.AUTO_QUANTIZER_MAPPING and "svdquant" in host.AUTO_QUANTIZATION_CONFIG_MAPPING
"""
    command, root = [sys.executable, "-c", statement + check], Path(diffusers_sana.__file__).parents[1]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_components_are_recorded_under_the_name_of_the_package():
    # A parent folder with the name of one of diffusers' pipelines would be taken for that pipeline.
    for name in _entries.UPSTREAM_NAMES:
        component = getattr(diffusers_sana, name)
        assert pipeline_loading_utils._fetch_class_library_tuple(component) == ("diffusers_sana", name)


def test_every_drop_in_is_exported_and_exists_in_diffusers():
    for ours, theirs in _entries.UPSTREAM_NAMES.items():
        assert hasattr(diffusers_sana, ours)
        assert hasattr(diffusers, theirs)
