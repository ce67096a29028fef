"""The exit code of an error; see `errors.py`."""

import pytest
import torch

from diffusers_sana.arguments import ArgumentParser
from diffusers_sana.checks import check_computed, check_number
from diffusers_sana.cli.errors import explain


@pytest.mark.parametrize(
    ("fail", "code"),
    [
        (lambda: check_number("guidance_scale", -1, at_least=0), 2),
        (
            lambda: check_computed(
                "transformer", "latents", torch.tensor(torch.nan), torch.float32, "`guidance_scale` is too large."
            ),
            1,
        ),
    ],
    ids=["option", "damaged weights"],
)
def test_what_a_model_computes_is_no_error_of_use(fail, code):
    """Also where the advice names an option."""
    command = ArgumentParser()
    command.add_argument("--guidance-scale")
    with pytest.raises(ValueError, match="guidance_scale") as caught:
        fail()
    message, found = explain(caught.value, command)
    assert "--guidance-scale" in message
    assert found == code
