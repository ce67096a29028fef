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
