"""Pipelines of both packages with equal weights; made once, because no test may change the weights."""

import diffusers
import pytest

import diffusers_sana
from tests import tiny


@pytest.fixture(scope="session")
def upstream():
    return tiny.pipeline(diffusers)


@pytest.fixture(scope="session")
def ours():
    return tiny.pipeline(diffusers_sana)


@pytest.fixture(scope="session")
def official_folder(tmp_path_factory):
    return tiny.write_official_folder(tmp_path_factory.mktemp("official"))


OFFLOADS = ("enable_model_cpu_offload", "enable_sequential_cpu_offload")


@pytest.fixture(params=[pytest.param(method, marks=pytest.mark.gpu) for method in OFFLOADS])
def offload(request):
    """The method of a pipeline that keeps its models off the accelerator while they are idle."""
    return request.param
