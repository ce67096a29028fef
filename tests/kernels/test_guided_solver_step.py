"""Guidance and solver step against their formula in float64."""

import itertools

import pytest
import torch

from diffusers_sana.kernels.dispatch import kernel_mode
from diffusers_sana.kernels.guided_solver_step import guided_solver_step
from tests.kernels.kernel_checks import DEVICE, DTYPES, check_kernel
from tests.numerics import assert_close_fp32, relative_error


WEIGHTS = (0.7, -0.4, 0.2)


def formula(model_output, sample, history, guidance_scale, sigma, sample_weight, prediction_weights):
    velocity = model_output.double()
    if guidance_scale is not None:
        first, second = velocity.chunk(2)
        velocity = (1 - guidance_scale) * first + guidance_scale * second
    prediction = velocity if sigma is None else sample.double() - sigma * velocity
    predictions = [prediction, *(tensor.double() for tensor in history)]
    products = [weight * tensor for weight, tensor in zip(prediction_weights, predictions, strict=True)]
    return sample_weight * sample.double() + sum(products), prediction


def inputs(shape, num_history=1, guidance_scale=4.5, sigma=0.6, dtype=torch.float32):
    rows = shape[0] * (1 if guidance_scale is None else 2)
    return {
        "model_output": torch.randn(rows, *shape[1:]).to(DEVICE, dtype),
        "sample": torch.randn(shape, device=DEVICE),
        "history": [torch.randn(shape, device=DEVICE) for _ in range(num_history)],
        "guidance_scale": guidance_scale,
        "sigma": sigma,
        "sample_weight": 0.9,
        "prediction_weights": WEIGHTS[: num_history + 1],
    }


def check(given):
    """The kernel by the rule of all kernels, both outputs at once."""
    tensors = {"model_output": given["model_output"], "sample": given["sample"]}
    tensors |= {f"history_{index}": tensor for index, tensor in enumerate(given["history"])}

    def operation(model_output, sample, **history):
        values = {"model_output": model_output, "sample": sample, "history": list(history.values())}
        return torch.stack(guided_solver_step(**given | values))

    check_kernel(operation, tensors, backward=False)


OPTIONS = list(itertools.product((0, 1, 2), (4.5, None), (0.6, None)))


@pytest.mark.parametrize(("num_history", "guidance_scale", "sigma"), OPTIONS)
def test_equals_the_formula(num_history, guidance_scale, sigma):
    given = inputs((2, 3, 5, 7), num_history, guidance_scale, sigma)
    for actual, expected in zip(guided_solver_step(**given), formula(**given), strict=True):
        assert_close_fp32(actual, expected)
    in_double = {name: given[name].double() for name in ("model_output", "sample")}
    in_double["history"] = [tensor.double() for tensor in given["history"]]
    for actual, expected in zip(guided_solver_step(**given | in_double), formula(**given), strict=True):
        assert relative_error(actual, expected) < 1e-14


def test_the_first_half_is_unconditional():
    given = inputs((1, 2, 3, 3), sigma=None, guidance_scale=1.0)
    assert_close_fp32(guided_solver_step(**given)[1], given["model_output"][1:])
    given["guidance_scale"] = 0.0
    assert torch.equal(guided_solver_step(**given)[1], given["model_output"][:1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_not_rounded_again(dtype):
    given = inputs((2, 3, 5, 7), dtype=dtype)
    for actual, expected in zip(guided_solver_step(**given), formula(**given), strict=True):
        assert actual.dtype == torch.float32
        assert_close_fp32(actual, expected, tolerance=1e-6)


@pytest.mark.parametrize("mode", ["torch", "triton"])
@pytest.mark.parametrize("guidance_scale", [4.5, None])
@pytest.mark.parametrize("sigma", [0.6, None])
def test_results_have_memory_of_their_own(sigma, guidance_scale, mode):
    given = inputs((2, 3, 4, 4), sigma=sigma, guidance_scale=guidance_scale)
    kept = [tensor.clone() for tensor in (given["model_output"], given["sample"], *given["history"])]
    with kernel_mode(mode):
        results = guided_solver_step(**given)
    before = [tensor.clone() for tensor in results]
    for tensor, copy in zip((given["model_output"], given["sample"], *given["history"]), kept, strict=True):
        assert torch.equal(tensor, copy)
        tensor.fill_(torch.nan)
    assert all(torch.equal(*pair) for pair in zip(results, before, strict=True))
    results[0].zero_()
    assert torch.equal(results[1], before[1])


def test_gradients_run_the_reference():
    given = inputs((1, 2, 3, 3))
    output = given["model_output"].double().requires_grad_()
    sample, history = given["sample"].double().requires_grad_(), given["history"][0].double().requires_grad_()

    def function(output, sample, history):
        return guided_solver_step(**given | {"model_output": output, "sample": sample, "history": [history]})

    assert torch.autograd.gradcheck(function, (output, sample, history))
    given["sample"].requires_grad_()
    with kernel_mode("triton"), pytest.raises(RuntimeError, match="requires a gradient"):
        guided_solver_step(**given)
    with kernel_mode("triton"), torch.no_grad():
        guided_solver_step(**given)


@pytest.mark.parametrize(("num_history", "guidance_scale", "sigma"), OPTIONS)
def test_kernel(num_history, guidance_scale, sigma):
    check(inputs((2, 3, 5, 7), num_history, guidance_scale, sigma))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1,), (5, 63), (1, 1, 1, 1), (3, 100, 11), (2, 33, 9, 13), (1, 2, 3, 4, 5)], ids=str
)
def test_kernel_of_shapes(shape, dtype):
    check(inputs(shape, dtype=dtype))


def test_kernel_with_strides():
    """A transformer's output is an image with channels last."""
    given = inputs((2, 40, 6, 7), num_history=2, dtype=torch.float16)
    last = torch.channels_last
    check(given | {"model_output": given["model_output"].to(memory_format=last)})
    check(
        given
        | {"sample": given["sample"].to(memory_format=last), "model_output": given["model_output"].mT.contiguous().mT}
    )
    check(given | {"history": [tensor.to(memory_format=last) for tensor in given["history"]]})


def test_kernel_is_an_operator():
    """Shapes, strides and dtypes that `torch.compile` is told are those of the kernel."""
    given = inputs((2, 3, 4, 5), num_history=2, dtype=torch.float16)
    given["sample"] = given["sample"].to(memory_format=torch.channels_last)
    with kernel_mode("triton"):
        expected = guided_solver_step(**given)
        compiled = torch.compile(guided_solver_step, fullgraph=True, backend="aot_eager")(**given)
    for actual, result in zip(compiled, expected, strict=True):
        assert torch.equal(actual, result)
        assert actual.stride() == result.stride()


def test_compiles_whole():
    given = inputs((2, 3, 4, 5))
    compiled = torch.compile(guided_solver_step, fullgraph=True, backend="eager")(**given)
    for actual, expected in zip(compiled, formula(**given), strict=True):
        assert_close_fp32(actual, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample": torch.randn(2, 3, 4).half()}, "must be fp32"),
        ({"sample": torch.randn(1, 3, 4)}, "do not fit"),
        ({"model_output": torch.randn(2, 3, 4)}, "do not fit"),
        ({"history": [torch.randn(1, 3, 4)]}, "do not fit"),
        ({"history": [torch.randn(2, 3, 4)] * 3}, "more than 2 earlier"),
    ],
)
def test_kernel_refuses(changes, message):
    with kernel_mode("triton"), pytest.raises(RuntimeError, match=message):
        guided_solver_step(**inputs((2, 3, 4)) | changes)
