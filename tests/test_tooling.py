"""Tools agree on versions, and what the documents name is there."""

import pathlib
import re
import tomllib

ROOT = pathlib.Path(__file__).parent.parent


def test_the_hooks_run_the_linter_that_make_check_runs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (pinned,) = [
        requirement
        for requirement in project["project"]["optional-dependencies"]["dev"]
        if requirement.startswith("ruff")
    ]
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert set(re.findall(r"ruff==[\d.]+", hooks)) == {pinned}


def test_documented_make_targets_are_there():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.M))
    for document in ("README.md", "CONTRIBUTING.md", ".ci/run"):
        text = (ROOT / document).read_text(encoding="utf-8")
        named = re.findall(r"^\s*(?:step .* )?make ([a-z-]+)", text, flags=re.M)
        assert named
        assert set(named) <= targets


def test_every_file_has_tests_that_are_quick(request):
    items = request.session.items
    quick = {item.path for item in items if item.get_closest_marker("slow") is None}
    assert quick == {item.path for item in items}
