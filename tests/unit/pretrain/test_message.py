"""Tensors that cross from stage to stage as one message arrive to the bit, and their gradients on the way back too."""

import pytest
import torch

from distributed.tiny import VOCABULARY, build, tiny_config
from pretrain.models.layer import Flow
from pretrain.parallel.message import Messages
from pretrain.synthetic import made_up_batch

CARRIERS = [torch.float32, torch.bfloat16]
CPU = torch.device("cpu")


@pytest.fixture
def batch():
    return made_up_batch(tiny_config(), VOCABULARY, torch.arange(8))


def across(flow: Flow, batch: Flow, carrier: torch.dtype) -> tuple[torch.Tensor, Flow]:
    """The message as it is received, and what the next stage, with messages of its own, takes out of it."""
    received = Messages(carrier, CPU).pack(flow, flow.keys()).detach().requires_grad_()
    return received, Messages(carrier, CPU).unpack(received, flow.keys(), batch)


@pytest.mark.parametrize("carrier", CARRIERS)
def test_every_border_between_two_layers_can_be_crossed(batch, carrier):
    model = build(tiny_config()).to(carrier)
    calls = model.calls(model.architecture.reports, batch)
    for border in range(1, len(calls)):
        flow = model.run_calls(calls[:border], batch)
        crossing = {name: flow[name] for name in calls[border - 1].after}
        _, arrived = across(crossing, batch, carrier)
        assert arrived.keys() == crossing.keys()
        for name, found in arrived.items():
            assert found.dtype == crossing[name].dtype, name
            assert torch.equal(found, crossing[name]), name
        rest = model.run_calls(calls[border:], batch, arrived)
        assert torch.equal(rest["loss/matching"], model.run(["loss/matching"], batch)["loss/matching"])


@pytest.mark.parametrize("carrier", CARRIERS)
def test_gradients_of_every_type_come_back_to_the_bit(batch, carrier):
    image = torch.randn(8, 4, 32, dtype=carrier).requires_grad_()
    losses = torch.randn(3).requires_grad_()  # fp32, whatever the carrier
    mask = torch.tensor([True, False, True])  # three bytes, which fill no whole number of the carrier's values
    flow = {"image": image, "losses": losses, "counts": torch.ones(3, 2, dtype=torch.int64), "mask": mask}
    sent = Messages(carrier, CPU).pack(flow, flow.keys())
    received, arrived = across(flow, batch, carrier)
    assert torch.equal(arrived["mask"], mask)
    image_gradient, losses_gradient = torch.randn_like(image), torch.tensor([1.0, 1e-7, 3.14159265])
    torch.autograd.backward([arrived["image"], arrived["losses"]], [image_gradient, losses_gradient])
    sent.backward(received.grad)
    assert torch.equal(image.grad, image_gradient)
    assert torch.equal(losses.grad, losses_gradient)


def test_what_later_layers_do_not_look_at_gets_a_gradient_of_zero(batch):
    flow = {"image": torch.randn(8, 4, 32).requires_grad_(), "losses": torch.randn(3).requires_grad_()}
    sent = Messages(torch.float32, CPU).pack(flow, flow.keys())
    received, arrived = across(flow, batch, torch.float32)
    arrived["losses"].sum().backward()
    sent.backward(received.grad)
    assert flow["image"].grad.count_nonzero() == 0
    assert torch.equal(flow["losses"].grad, torch.ones(3))


def test_an_infinity_and_a_nan_arrive_as_they_are(batch):
    losses = torch.tensor([float("inf"), float("nan"), -0.0])
    _, arrived = across({"losses": losses}, batch, torch.bfloat16)
    assert losses.view(torch.int32).tolist() == arrived["losses"].view(torch.int32).tolist()
