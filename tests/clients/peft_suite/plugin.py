"""A pytest plugin: PEFT's own tests, with our configurations in place of its methods."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections import Counter
from types import ModuleType

import pytest
import torch

import sparsecraft as sc
from sparsecraft.interop.peft.tuner import RecipeTuner
from tests.clients.peft_suite import configurations, failures, models

PACKAGE = "peft_tests"
TABLES = (
    "ALL_CONFIGS",
    "ALL_CONFIG_CLASSES",
    "ALL_PEFT_CONFIG_CLASSES",
    "QA_CONFIGS",
    "TEST_CASES",
    "TOKEN_CLS_CONFIGS",
)
"""PEFT's tables of all its methods; a table inside a test is of a few that share something."""
ROWS = {
    ("config_cls", "config_kwargs"): lambda definition: configurations.of_task(_owner(definition)),
    ("config_class", "mandatory_kwargs"): lambda _: configurations.of_configs(),
    ("test_name", "model_id", "config_cls", "config_kwargs"): (
        lambda _: configurations.of_custom_models()
    ),
    ("config_cls",): lambda _: configurations.of_classes(),
}
"""The arguments of a table of PEFT's methods -> our rows of it."""
OF_EVERY_TYPE = "::test_from_peft_type"
_start = {"moved": False}
_tests: set[str] = set()


def _owner(definition: pytest.Item) -> str:
    """The class, if it has a task of its own, or the module."""
    name = definition.cls.__name__ if definition.cls else ""
    return name if name in configurations.TASKS else definition.module.__name__.rpartition(".")[2]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--whole", action="store_true", help="hold the list to be complete")


def pytest_configure(config: pytest.Config) -> None:
    sys.path.insert(0, str(config.rootpath))
    shared = importlib.import_module(f"{PACKAGE}.testing_utils")
    _replace(shared)
    custom = importlib.import_module(f"{PACKAGE}.test_custom_models")
    _add_blocks(custom)


def _replace(shared: ModuleType) -> None:
    """Let PEFT's `set_init_weights_false` move our adapters from a start that changes nothing, and
    its `hub_online_once` leave the hub alone."""
    shared.hub_online_once = contextlib.nullcontext
    theirs = shared.set_init_weights_false

    def set_init_weights_false(config_cls: type, kwargs: dict) -> dict:
        if not issubclass(config_cls, sc.SparsecraftConfig):
            return theirs(config_cls, kwargs)
        _start["moved"] = True
        return kwargs.copy()

    shared.set_init_weights_false = set_init_weights_false
    inject = RecipeTuner.inject_adapter

    def inject_adapter(self: RecipeTuner, model, adapter_name: str, *args, **kwargs) -> None:
        inject(self, model, adapter_name, *args, **kwargs)
        for name, parameter in model.named_parameters() if _start["moved"] else ():
            if self.prefix in name and adapter_name in name.split("."):
                parameter.data += 0.3 * torch.randn_like(parameter)

    RecipeTuner.inject_adapter = inject_adapter


def _add_blocks(custom: ModuleType) -> None:
    """A custom model with blocks, which recipes need, beside PEFT's own."""
    theirs = custom.MockTransformerWrapper.from_pretrained

    def from_pretrained(model_id: str, dtype: torch.dtype | None = None) -> torch.nn.Module:
        if model_id != "Blocks":
            return theirs(model_id, dtype)
        torch.manual_seed(0)
        model = models.Blocks().to(dtype or torch.float32)
        model.dtype = dtype or torch.float32
        return model

    custom.MockTransformerWrapper.from_pretrained = staticmethod(from_pretrained)


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    definition = metafunc.definition
    if any(_is_table(mark, definition.module) for mark in definition.own_markers):
        _tests.add(definition.nodeid)
        definition.own_markers[:] = [_ours(mark, definition) for mark in definition.own_markers]


def _ours(mark: pytest.Mark, definition: pytest.Item) -> pytest.Mark:
    if not _is_table(mark, definition.module):
        return mark
    return pytest.mark.parametrize(mark.args[0], ROWS[_arguments(mark)](definition)).mark


def _is_table(mark: pytest.Mark, module: ModuleType) -> bool:
    if _arguments(mark) not in ROWS:
        return False
    return any(mark.args[1] is getattr(module, name, None) for name in TABLES)


def _arguments(mark: pytest.Mark) -> tuple[str, ...]:
    if mark.name != "parametrize":
        return ()
    names = mark.args[0]
    return tuple(n.strip() for n in (names.split(",") if isinstance(names, str) else names))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests that have a table of methods; the others are of one method of PEFT's."""
    others = [item for item in items if not _is_kept(item)]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if _is_kept(item)]


def _is_kept(item: pytest.Item) -> bool:
    name = item.nodeid.partition("[")[0]
    return name in _tests or name.endswith(OF_EVERY_TYPE)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """A listed failure is expected, in the words that are listed; nothing else of it is."""
    report = yield
    listed = failures.of(item.nodeid) if report.when == "call" else []
    if report.failed and (found := _meant(listed, report.longreprtext)):
        report.outcome, report.wasxfail = "skipped", found.reason
    elif report.passed and listed:
        report.outcome = "failed"
        report.longrepr = f"Listed as a failure, and passes: {listed[0].reason}"
    return report


def _meant(listed: list[failures.Failure], text: str) -> failures.Failure | None:
    return next((failure for failure in listed if failure.words in text), None)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Compare the counts, once, where the whole suite has run."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or not session.config.getoption("whole"):
        return
    expected = reporter.stats.get("xfailed", [])
    found = Counter(report.wasxfail for report in expected)
    listed = Counter()
    for failure in failures.FAILURES:
        listed[failure.reason] += failure.count
    found |= {kind: len(reporter.stats.get(kind, [])) for kind in ("passed", "skipped")}
    listed |= {"passed": failures.PASSED, "skipped": failures.SKIPPED}
    wrong = {key: n for key, n in found.items() if listed[key] != n}
    wrong |= {key: 0 for key, n in listed.items() if n and key not in found}
    for key, count in wrong.items():
        reporter.write_line(f"\nlisted {listed[key]}, found {count}: {key}")
    if wrong:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(autouse=True)
def _exact_start():
    _start["moved"] = False
