"""The contrastive loss over gathered features has the gradient of one process that holds the whole batch."""

import pytest
import torch
import torch.nn.functional as F

from pretrain.collectives import row_offset
from pretrain.objectives.contrastive import Identity, contrastive_loss
from pretrain.parallel.mesh import Mesh

G, E = 16, 8


def features_and_ids():
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(G, E, generator=generator), dim=1) for _ in range(2))
    identity = Identity(torch.arange(G), torch.arange(G))
    identity.image_ids[3], identity.caption_ids[9] = identity.image_ids[12], identity.caption_ids[1]
    return image, text, identity


def gradients(mesh):
    """Loss and gradients of this rank's rows, averaged over ranks as an engine averages them."""
    image_GE, text_GE, identity = features_and_ids()
    B = G // mesh.dp.size
    first = row_offset(B, mesh.dp.group)
    mine = slice(first, first + B)
    image, text = (x[mine].clone().requires_grad_() for x in (image_GE, text_GE))
    log_scale = torch.tensor([1.3], requires_grad=True)
    ids = Identity(identity.image_ids[mine], identity.caption_ids[mine])
    loss, counts = contrastive_loss(image, text, log_scale, ids, mesh.dp.group)
    loss.backward()
    return {
        "loss": mesh.dp.mean(loss.detach()),
        "counts": mesh.dp.sum(counts),
        "log_scale": mesh.dp.mean(log_scale.grad),
        "image": image.grad / mesh.dp.size,
        "text": text.grad / mesh.dp.size,
    }


@pytest.fixture(scope="module")
def whole():
    return gradients(Mesh(torch.device("cpu")))


@pytest.mark.parametrize("ranks", ["two_ranks", "four_ranks"])
def test_gathered_gradients_are_those_of_the_whole_batch(request, whole, ranks):
    parts = request.getfixturevalue(ranks).run(gradients)
    for side in ("image", "text"):
        torch.testing.assert_close(torch.cat([part[side] for part in parts]), whole[side], rtol=1e-5, atol=1e-7)
    for part in parts:
        torch.testing.assert_close(part["loss"], whole["loss"])
        assert part["counts"].tolist() == whole["counts"].tolist()


def test_the_temperature_is_counted_once(two_ranks, whole):
    for part in two_ranks.run(gradients):
        torch.testing.assert_close(part["log_scale"], whole["log_scale"])


def test_a_false_negative_gives_no_gradient():
    """Samples 1 and 9 share a caption: pushing them apart would be wrong."""
    image, text, identity = features_and_ids()
    text.requires_grad_()
    contrastive_loss(image, text, torch.tensor([1.3]), identity, None)[0].backward()
    text_grad = text.grad.clone()
    moved = image.clone()
    moved[9] = F.normalize(moved[9] + 0.5, dim=0)  # only caption 9's image changes ...
    again = text.detach().clone().requires_grad_()
    contrastive_loss(moved, again, torch.tensor([1.3]), identity, None)[0].backward()
    torch.testing.assert_close(again.grad[1], text_grad[1])  # ... and caption 1, its twin, does not feel it
    assert not torch.allclose(again.grad[2], text_grad[2])
