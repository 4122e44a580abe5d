"""Writes the tables of small-models, and README's, from the logs that lie beside them.

    python docs/results/tables.py

README's is of the study. In those of small-models each method is shown at the learning
rate with the lowest mean loss. Paired differences are over the seeds that both have, ±
their standard error; the number in brackets is that of seeds.
"""

import collections
import json
import re
import statistics

from logs import LOGS, README, best, difference, judged, losses, mean, read, table

# Those that README shows of the study.
JUDGED = {"GPT-2": "gpt2-small", "BERT": "bert-small"}
IN_README = {
    "`came_muon`, int8 momentum": "came-muon-int8",
    "`came_muon`, int4 momentum": "came-muon-int4",
    "`came_muon`, float32 momentum": "came-muon",
    "Muon": "muon",
    "NorMuon, as in its paper": "normuon",
    "`steady_came`": "steady-came",
    "`steady_came`, int8 momentum": "steady-came-int8",
    "NAdamW": "nadamw",
    "AdamW": "adamw",
    "AdamW in 8 bits": "flash-adamw",
    "Adafactor, no momentum": "adafactor",
    "`came`, as published": "came",
}
TASKS = {"GPT-2": "gpt2", "BERT": "bert", "T5": "t5"}
# Of several methods under one name, the one with the lowest mean loss is shown.
OPTIMIZERS = {
    "`steady_came`": ["steady-came"],
    "the same, int8 momentum": ["steady-came-int8"],
    "the same, int4 momentum": ["steady-came-int4"],
    "Muon and `steady_came`, int8": ["muon-int8"],
    "Muon": ["muon"],
    "NAdamW": ["nadamw", "nadamw-b2-0.999"],
    "AdamW": ["adamw", "adamw-b2-0.999"],
    "AdamW in 8 bits": ["flash-adamw"],
    "Adafactor, momentum 0.9": ["adafactor"],
    "Adafactor, no momentum": ["adafactor-b1-0"],
    "`came`, as published": ["came"],
    "Lion": ["lion"],
}
LARGER = {
    "GPT-2, 0.14 M": "gpt2",
    "GPT-2, 0.29 M": "gpt2-larger",
    "BERT, 0.11 M": "bert",
    "BERT, 0.45 M": "bert-larger",
}
PARTS = {
    "no Nesterov momentum": "steady-came-no-nesterov",
    "no confidence": "steady-came-no-confidence",
    "no bias correction": "steady-came-no-bias-correction",
    "β2 0.99": "steady-came-b2-0.99",
    "β2 0.999": "steady-came-b2-0.999",
    "β3 0.999": "steady-came-b3-0.999",
    "ε2 0.01": "steady-came-eps2-0.01",
    "ε2 1e-16": "steady-came-eps2-1e-16",
    "no final clip": "steady-came-no-clip",
    "each update's RMS 0.4": "steady-came-rms-0.4",
    "int8 momentum": "steady-came-int8",
    "int4 momentum": "steady-came-int4",
}
PUBLISHED = {
    "as published": "came",
    "β2 0.95, β3 0.995": "came-b2-0.95-b3-0.995",
    "β3 0.999": "came-b3-0.999",
    "warmup over 2 % of the steps": "came-warmup-2",
    "no warmup": "came-warmup-0",
    "bias correction": "came-bc",
    "bias correction, β2 0.95, β3 0.995": "came-bc-b2-0.95-b3-0.995",
}


def grid(corner, columns, rows, cell):
    """Returns a table of what ``cell`` makes of each row's and each column's value."""
    head = [corner, *columns]
    return table(
        head,
        [[name, *(cell(x, y) for y in columns.values())] for name, x in rows.items()],
    )


def tasks(names=TASKS):
    return {task: read(TASKS[task])[0] for task in names}


def study_table():
    """Returns README's: losses, and differences to AdamW's at the same seeds."""
    tasks = {title: judged(task) for title, task in JUDGED.items()}
    rows = []
    for name, optimizer in IN_README.items():
        taken, cells = [], []
        for runs in tasks.values():
            if not (by_seed := runs.get(optimizer)):  # Judged on GPT-2 alone.
                cells += ["", ""]
                continue
            taken += [run["state_bytes_per_parameter"] for run in by_seed.values()]
            gap = "" if name == "AdamW" else difference(by_seed, runs["adamw"])
            cells += [f"{statistics.mean(losses(by_seed).values()):.3f}", gap]
        rows.append([name, span(taken), *cells])
    head = [text for title in tasks for text in (title, "− AdamW's")]
    return table(["optimizer", "bytes / parameter", *head], rows)


def span(numbers):
    low, high = (f"{x:.1f}" for x in (min(numbers), max(numbers)))
    return low if low == high else f"{low} to {high}"


def losses_table():
    logs = {task: read(name) for task, name in TASKS.items()}
    rows = []
    for name, methods in OPTIMIZERS.items():
        taken, cells = [], []
        for runs, of_method in logs.values():
            method, _, by_seed = best(runs, methods)
            taken.append(of_method[method])
            cells.append(f"{mean(losses(by_seed).values())} ({len(by_seed)})")
        rows.append([name, span(taken), *cells])
    return table(["optimizer", "bytes / parameter", *TASKS], rows)


def differences_table():
    def cell(methods, runs):
        return difference(best(runs, methods)[2], best(runs, ["steady-came"])[2])

    others = {k: v for k, v in OPTIMIZERS.items() if k != "`steady_came`"}
    return grid("loss − `steady_came`'s", tasks(), others, cell)


def rates_table():
    def cell(methods, runs):
        method, rate, _ = best(runs, methods)
        return f"{rate:.1e} of {len(runs[method])}"

    return grid("best learning rate, of how many", tasks(), OPTIMIZERS, cell)


def sizes_table():
    def cell(methods, runs):
        if not (found := best(runs, methods)):
            return ""
        _, rate, by_seed = found
        loss = statistics.mean(losses(by_seed).values())
        return f"{loss:.3f} at {rate:.1e} ({len(by_seed)})"

    logs = {size: read(name)[0] for size, name in LARGER.items()}
    rows = {k: v for k, v in OPTIMIZERS.items() if best(logs["BERT, 0.45 M"], v)}
    return grid("optimizer", logs, rows, cell)


def parts_table():
    """Each at its best learning rate, against steady_came at that one if it has it."""

    def cell(method, runs):
        if not (found := best(runs, [method])):
            return ""
        same = runs["steady-came"].get(found[1], {})
        ours = same if len(same) > 2 else best(runs, ["steady-came"])[2]
        return difference(found[2], ours)

    return grid("`steady_came` with", tasks(), PARTS, cell)


def published_table():
    def cell(method, runs):
        _, rate, by_seed = best(runs, [method])
        return f"{mean(losses(by_seed).values())} at {rate:.1e} ({len(by_seed)})"

    return grid("`came`", tasks(["GPT-2", "BERT"]), PUBLISHED, cell)


def batches_table():
    def cell(method, runs):
        return difference(best(runs, [method])[2], best(runs, ["adamw"])[2])

    logs = {
        "batches of 32, 4,800 steps": read("bert-batches-of-32")[0],
        "of 256, 600 steps": read("bert")[0],
    }
    rows = {
        "`steady_came`, no Nesterov momentum": "steady-came-no-nesterov",
        "Adafactor, momentum 0.9": "adafactor",
        "`came`, as published": "came",
    }
    return grid("loss − AdamW's", logs, rows, cell)


def clip_table():
    runs = collections.defaultdict(dict)
    log = LOGS / "final_clip.jsonl"
    for line in log.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        key = row["task"], row["variant"], row["learning_rate"]
        runs[key][row["seed"]] = {"loss": row["validation_loss"]}

    def cell(variant, task_and_rate):
        task, rate = task_and_rate
        return difference(runs[task, variant, rate], runs[task, "final clip", rate])

    columns = {
        "GPT-2": ("gpt2", 0.0056),
        "BERT": ("bert", 0.0056),
        "T5": ("t5", 0.0032),
    }
    variants = {
        "`update_clipping_threshold=None`, the default": "no final clip",
        "that, and `clipping_threshold=None`": "no clip",
    }
    return grid("loss − that with both at 1", columns, variants, cell)


def fine_tuning_table():
    runs, taken = read("fine-tuning")
    _, _, ours = best(runs, ["steady-came"], 5)  # A few rates had one seed.
    rows = []
    for name in ("`steady_came`", "NAdamW", "AdamW", "Adafactor, momentum 0.9"):
        method, rate, by_seed = best(runs, OPTIMIZERS[name], 5)
        rows.append(
            {
                "optimizer": name,
                "bytes / parameter": f"{taken[method]:.1f}",
                "learning rate": f"{rate:.1e}",
                "loss": mean(losses(by_seed).values()),
                "− `steady_came`'s": ""
                if method == "steady-came"
                else difference(by_seed, ours),
                "sentences right (%)": mean(
                    (100 * run["accuracy"] for run in by_seed.values()), 1
                ),
            }
        )
    return table(rows[0], [row.values() for row in rows])


def largest_updates():
    """Returns the largest update of each of `came`'s runs, in learning rates."""
    return [
        run["largest_update"]
        for name in (*TASKS.values(), "bert-batches-of-32")
        for by_seed in read(name)[0]["came"].values()
        for run in by_seed.values()
    ]


def tables():
    """Returns the text of each file."""
    return {
        "losses": losses_table(),
        "differences": differences_table(),
        "rates": rates_table(),
        "sizes": sizes_table(),
        "parts": parts_table(),
        "published": published_table(),
        "batches": batches_table(),
        "final_clip": clip_table(),
        "fine_tuning": fine_tuning_table(),
    }


def readme(text):
    """Returns README's text with its table of losses."""
    start, end = "<!-- losses -->\n", "<!-- end of losses -->"
    new = f"{start}{study_table()}{end}"
    return re.sub(f"{start}.*?{end}", lambda _: new, text, flags=re.S)


def main():
    for name, text in tables().items():
        (LOGS / f"{name}.md").write_text(text, encoding="utf-8")
    text = README.read_text(encoding="utf-8")
    README.write_text(readme(text), encoding="utf-8")
    updates = largest_updates()
    print(f"came's largest updates: {min(updates):.1f} to {max(updates):.1f}")


if __name__ == "__main__":
    main()
