"""How much memory does an update move on accelerators?

Compiles the update of a GPT-2 for a chip that need not be there, and counts the bytes
that its kernels read from and write to the chip's memory. The count must be exactly 12
bytes per parameter for SGD and 28 for AdamW. TPUs need the `tpu` extra, the H100 JAX's
CUDA plugin. One chip a run:

    python benchmarks/compiled_traffic.py --chip v5e
"""

import argparse
import pathlib
import sys

import jax
import tqdm
from measuring import output
from measuring.chips import CHIPS, target
from measuring.examples import gpt2
from measuring.optimizers import AS_WRITTEN, OPTIMIZERS
from measuring.updates import count, number
from measuring.zoo import gpt2_shapes

EXACT = {"SGD": 12.0, "AdamW": 28.0}  # Bytes per parameter.


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chip", choices=CHIPS, default="v5e")
    parser.add_argument("--size", choices=gpt2.SIZES, default="small")
    every = {**OPTIMIZERS, **AS_WRITTEN}
    parser.add_argument("--optimizers", nargs="+", choices=every, default=list(every))
    parser.add_argument("--output", type=pathlib.Path, default=output.DEFAULT)
    args = parser.parse_args()

    device = target(args.chip).devices[0]
    params = gpt2_shapes(args.size)
    rows = [
        {args.chip: name} | count(every[name](), params, device)
        for name in tqdm.tqdm(args.optimizers, unit="optimizer")
    ]
    output.write(
        args.output,
        f"compiled_traffic_{args.chip}",
        rows,
        model=f"gpt2 {args.size}",
        parameters=number(params),
        largest_leaf_bytes=max(4 * p.size for p in jax.tree.leaves(params)),
        jax=jax.__version__,
    )
    for row in rows:
        exact = EXACT.get(row[args.chip])
        if exact not in (None, row["bytes/parameter"]):
            sys.exit(f"{row[args.chip]} must move {exact} bytes per parameter")


if __name__ == "__main__":
    main()
