"""WiKG: instances as a graph of who attends to whom, and messages along it (Li et al. 2024)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from pathme_jax.mil.heads.common import Bag, Out, masked_softmax, single


class WiKG(nn.Module):
    """A dynamic graph of heads and tails, knowledge-aware attention, bi-interaction (Li et al. 2024, eq. 2–10).

        h ← (h + mean h) / 2;   head = W_h h,  tail = W_t h;   N(i) = the k largest of head_i · tail_j / √hidden
        edge:     r_ij = softmax_j(head_i · tail_j / √hidden) tail_j
        message:  u_ij = softmax_j(tail_j · tanh(head_i + r_ij)),   n_i = Σ_j u_ij tail_j
        update:   x_i = lrelu(W₁ (head_i + n_i)) + lrelu(W₂ (head_i ⊙ n_i))
        logits = C · LN(Σ a_i x_i),   a = softmax(w · lrelu(V x))

    The neighbours are searched for block by block, so that no (m, m) matrix is held; the gradient goes through the
    scores of the found edges only, as through a top-k.

    Cost: O(m²) in time for the search, O(m · k) in memory. Meant for bags up to about 50,000 instances on an
    accelerator, a few thousand on a CPU.

    Differences from the paper and its code:
        The message's score is the dot product of the paper; the code's einsum ("ijkl,ijkm->ijk") multiplies the sum
        of tail_j by the sum of the tanh, which is something else.
        With fewer than k instances an instance has as many neighbours as there are.
        Dropout on the embedding too, as in MIL-Lab. w has no bias, which the softmax would not notice.

    An instance may be its own neighbour, as in the code. `attention`, (1, m): of the pooling.

    Attributes:
        outputs: o.
        hidden: width of nodes.
        neighbours: k.
        dropout: of the embedding and the messages.
        block: instances whose neighbours are searched for at once.
    """

    outputs: int
    hidden: int = 512
    neighbours: int = 6
    dropout: float = 0.3
    block: int = 1024

    @nn.compact
    def __call__(self, bag: Bag, train: bool = False) -> Out:
        drop = nn.Dropout(self.dropout, deterministic=not train)
        h = drop(nn.leaky_relu(nn.Dense(self.hidden, name="embed")(bag.features)))
        mean = jnp.where(bag.mask[:, None], h, 0).sum(0) / jnp.maximum(bag.mask.sum(), 1)
        h = (h + mean) / 2
        head = nn.Dense(self.hidden, name="head")(h)
        tail = nn.Dense(self.hidden, name="tail")(h)

        index, real = nearest(head, tail, bag.mask, self.neighbours, self.block)
        near = tail[index]  # (m, k, hidden)
        edge = jnp.einsum("mc,mkc->mk", head, near) * self.hidden**-0.5
        relation = masked_softmax(edge, real)[..., None] * near
        score = jnp.einsum("mkc,mkc->mk", near, jnp.tanh(head[:, None] + relation))
        message = jnp.einsum("mk,mkc->mc", masked_softmax(score, real), near)

        both = nn.Dense(self.hidden, name="sum")(head + message)
        product = nn.Dense(self.hidden, name="product")(head * message)
        x = drop(nn.leaky_relu(both) + nn.leaky_relu(product))

        hidden = nn.leaky_relu(nn.Dense(self.hidden // 2, name="attend_hidden")(x))
        # No bias: the softmax over instances would not notice it.
        a = masked_softmax(nn.Dense(1, use_bias=False, name="attend")(hidden)[:, 0], bag.mask)
        z = nn.LayerNorm(1e-5, name="norm")(a @ x)
        return single(nn.Dense(self.outputs, name="classify")(z), a[None])


def nearest(
    head: Array, tail: Array, mask: Array, neighbours: int, block: int
) -> tuple[Array, Array]:
    """The rows with the largest head_i · tail_j: (m, k) indices, and (m, k) which of them are instances."""
    head, tail = jax.lax.stop_gradient((head, tail))
    m, k = len(mask), min(neighbours, len(mask))
    blocks = -(-m // block)
    size = -(-m // blocks)

    def search(rows: Array) -> tuple[Array, Array]:
        values, index = jax.lax.top_k(jnp.where(mask, rows @ tail.T, -jnp.inf), k)
        return index, values > -jnp.inf

    rows = jnp.pad(head, ((0, blocks * size - m), (0, 0))).reshape(blocks, size, -1)
    found = jax.lax.map(search, rows)
    return jax.tree.map(lambda x: x.reshape(blocks * size, k)[:m], found)
