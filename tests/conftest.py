"""Shared by all tests: one thread, a fixed seed, fresh settings, and NaN in memory that nobody has written."""

import os

import pytest
import torch


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need the network
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: kernels run on CPU tensors


@pytest.fixture(autouse=True)
def _deterministic():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    # Fills what `torch.empty` returns with NaN, so that an output left unwritten cannot pass by luck.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _as_in_a_new_process():
    """Undoes what other tests, or benchmarks they import, have set for the whole process."""
    import diffusers  # after the environment is set
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    diffusers.utils.logging.set_verbosity_warning()
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


# The files that take longest. Begun first, none of them keeps one process busy at the end while the other is idle.
LONGEST = {
    "test_ray.py",
    "test_compile.py",
    "test_notebooks.py",
    "test_resume.py",
    "test_demo.py",
    "test_docs_code.py",
    "test_compile_kernels.py",
    "test_api.py",
    "test_auto_vila_u.py",
    "test_train_distributed.py",
    "test_bench_gpu.py",
    "test_bench_vila_u.py",
    "test_folders.py",
    "test_verification.py",
    "test_threads.py",
    "test_processes.py",
    "test_train_vila_u_emoji.py",
    "test_sequence_parallel.py",
    "test_compat.py",
    "test_train_dc_ae.py",
    "test_cfg_parallel.py",
}


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.path.name not in LONGEST)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
