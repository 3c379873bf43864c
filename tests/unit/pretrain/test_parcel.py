"""A flow that crosses from stage to stage as one tensor arrives to the bit, and its gradient on the way back too."""

import pytest
import torch

from distributed.tiny import PAD, VOCABULARY, samples, tiny_config
from pretrain.models.architectures import layer_specs
from pretrain.models.flow import Flow
from pretrain.models.model import build_model
from pretrain.parallel.parcel import Parcels

CARRIERS = [torch.float32, torch.bfloat16]


@pytest.fixture
def model():
    config = tiny_config()
    return build_model(layer_specs(config, VOCABULARY), config, PAD, torch.device("cpu"))


def across(flow: Flow, fresh: Flow, carrier: torch.dtype) -> tuple[torch.Tensor, Flow]:
    """The parcel as it is received, and what the next stage, with parcels of its own, takes out of it."""
    received = Parcels(carrier).pack(flow, fresh).detach().requires_grad_()
    return received, Parcels(carrier).unpack(received, fresh)


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("border", range(1, 10))
def test_every_border_between_two_layers_can_be_crossed(model, carrier, border):
    batch = samples(torch.arange(8)).tensors()
    model = model.to(carrier)
    flow = fresh = model.start(**batch)
    for layer in list(model.children())[:border]:
        flow = layer(flow)
    _, arrived = across(flow, fresh, carrier)
    for name, sent, found in zip(Flow._fields, flow, arrived, strict=True):
        assert sent.dtype == found.dtype, name
        assert torch.equal(sent, found), name


def test_what_the_batch_alone_makes_does_not_travel(model):
    fresh = model.start(**samples(torch.arange(8)).tensors())
    flow = model.image_embed(fresh)
    assert len(Parcels(torch.float32).pack(flow, fresh)) < flow.image.numel() + 20


@pytest.mark.parametrize("carrier", CARRIERS)
def test_gradients_of_every_type_come_back_to_the_bit(model, carrier):
    fresh = model.start(**samples(torch.arange(8)).tensors())
    image = torch.randn(8, 4, 32, dtype=carrier).requires_grad_()
    losses = torch.randn(3).requires_grad_()  # fp32, whatever the carrier
    flow = fresh._replace(image=image, losses=losses, counts=fresh.counts + 1)
    parcels = Parcels(carrier)
    sent = parcels.pack(flow, fresh)
    received, arrived = across(flow, fresh, carrier)
    image_gradient, losses_gradient = torch.randn_like(image), torch.tensor([1.0, 1e-7, 3.14159265])
    torch.autograd.backward([arrived.image, arrived.losses], [image_gradient, losses_gradient])
    sent.backward(received.grad)
    assert torch.equal(image.grad, image_gradient)
    assert torch.equal(losses.grad, losses_gradient)


def test_what_later_layers_do_not_look_at_gets_a_gradient_of_zero(model):
    fresh = model.start(**samples(torch.arange(8)).tensors())
    image, losses = torch.randn(8, 4, 32).requires_grad_(), torch.randn(3).requires_grad_()
    flow = fresh._replace(image=image, losses=losses)
    sent = Parcels(torch.float32).pack(flow, fresh)
    received, arrived = across(flow, fresh, torch.float32)
    arrived.losses.sum().backward()
    sent.backward(received.grad)
    assert image.grad.count_nonzero() == 0
    assert torch.equal(losses.grad, torch.ones(3))


def test_an_infinity_and_a_nan_arrive_as_they_are(model):
    fresh = model.start(**samples(torch.arange(8)).tensors())
    losses = torch.tensor([float("inf"), float("nan"), -0.0])
    _, arrived = across(fresh._replace(losses=losses), fresh, torch.bfloat16)
    assert losses.view(torch.int32).tolist() == arrived.losses.view(torch.int32).tolist()
