"""The attentional pooler of CoCa (Yu 2022), as CONCH and TITAN's patch encoder use it."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from pathme_jax.models.transformer import Dtype, attend, fan_in_normal, trunc_normal

Array = jax.Array


class AttentionalPooler(nn.Module):
    """One learned query looks at every token: LN(W_o MHA(W_q LN(q), W_k LN(x), W_v LN(x))).

    Attributes:
        width: of the query and of what comes out; tokens may have another. heads: divide it.
        use_bias: of the four projections; CONCH has biases, CONCH v1.5 none.
    """

    width: int
    heads: int = 8
    use_bias: bool = True
    dtype: Dtype = "float32"

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        """tokens: (b, n, d), CLS among them, to (b, width)."""

        def dense(name: str) -> nn.Dense:
            return nn.Dense(
                self.width, self.use_bias, kernel_init=fan_in_normal, dtype=self.dtype, name=name
            )

        def norm(name: str) -> nn.LayerNorm:
            return nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name=name)

        b = tokens.shape[0]
        query = norm("norm_query")(self.param("probe", trunc_normal, (1, self.width)))
        tokens = norm("norm_tokens")(tokens)
        query, key, value = (
            x.reshape(*x.shape[:-1], self.heads, self.width // self.heads)
            for x in (dense("query")(query), dense("key")(tokens), dense("value")(tokens))
        )
        mixed = attend(jnp.broadcast_to(query, (b, *query.shape)), key, value, None)
        return norm("norm")(dense("out")(mixed.reshape(b, 1, self.width))[:, 0])
