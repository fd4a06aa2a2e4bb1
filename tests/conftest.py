"""What the tests share: a network that can be enumerated, data of elsewhere, and one browser.

A `Table` stands in for the Transformer wherever the mathematics is checked. Its answers to all
(V+1)^L partly masked inputs are tabulated, so that expectations are sums, and with the true
conditionals of a known joint they have known values.
"""

import itertools
import os
import signal
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several beside each other: a thread each
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # or each of 170 processes compiles our files anew

import pages
import pytest
import torch

import diffusion

ROOT = Path(__file__).resolve().parent.parent
V, L = 3, 4
# A background job of a shell ignores this signal, and so do its children.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """One worker more than cores, because many tests wait for processes of their own."""
    return 1 + (os.cpu_count() or 1)


# Files of a minute or more on slow cores begin first, or a worker would end alone with one of them.
LONG = ("cuda", "data", "smdm_claims", "train", "fuzz", "survive", "reverse_curse", "gpu", "bench")
LONG += ("parallel", "radd_claims", "environment", "plot_log", "quality_speed", "recipe")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONG)


class Table(torch.nn.Module):
    """The network's interface over a table of logits ((V+1)^L, L, V), in float64: a row for each x.

    The table is one parameter, so it has a gradient and a device as a network has. The hidden
    states are the logits themselves (D = V) and the head is the identity. It reads sequences of
    length L = block_size only.
    """

    config, causal, row_loss = {"attention": "full"}, False, None

    def __init__(self, logits):
        super().__init__()
        self.block_size, self.vocab_size = logits.shape[1:]
        self.mask_id = self.start_id = self.vocab_size
        self.logits = torch.nn.Parameter(logits.clone())  # ((V+1)^L, L, V)
        self.register_buffer("identity", torch.eye(self.vocab_size, dtype=logits.dtype))  # (V, V)

    def hidden(self, x, masked_idx=None):
        """(B, L) -> (B, L, V), or at masked_idx (N,): (N, V)."""
        assert x.shape[1] == self.block_size
        power = torch.arange(self.block_size - 1, -1, -1, device=x.device)  # (L,)
        h = self.logits[(x * (self.vocab_size + 1) ** power).sum(1)]  # (B, L, V)
        return h if masked_idx is None else h.flatten(0, 1)[masked_idx]

    def head_parameters(self):
        return self.identity, None

    def head(self, h):
        return h

    @property
    def device(self):
        return self.logits.device

    def forward(self, x):
        return self.head(self.hidden(x))


def states(n, length):
    """Every sequence of `length` ids below n, in the order of Table's rows: (n^length, length)."""
    return torch.tensor(list(itertools.product(range(n), repeat=length)))


def random_joint(seed=1):
    """p(x0) > 0 over [0, V)^L, float64: (V, V, V, V)."""
    noise = torch.randn(V**L, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (1.5 * noise).softmax(0).view([V] * L)


def random_logits(seed=2):
    """Logits ((V+1)^L, L, V) that belong to no joint and are not normalised."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((V + 1) ** L, L, V, dtype=torch.float64, generator=generator)


def true_conditionals(joint):
    """log p(x0_i = v | visible tokens of x) at the masked positions i of every x: ((V+1)^L, L, V).

    At visible positions it is noise: what a network says of them must not matter.
    """
    log_p = random_logits(seed=3).log_softmax(-1)
    for row, x in enumerate(states(V + 1, L).tolist()):
        place = tuple(slice(None) if token == V else slice(token, token + 1) for token in x)
        agree = joint[place]  # V or 1 along each axis
        for i in (i for i in range(L) if x[i] == V):
            log_p[row, i] = (agree.sum([j for j in range(L) if j != i]) / agree.sum()).log()  # (V,)
    return log_p


def training_mask(objective, seed, step, position, batch_size, L, schedule=diffusion.loglinear):
    """(mask (B, L), weight (B,)) of rows `position` of a global batch, as training draws them."""
    u, noise = diffusion.stratified_uniforms(seed, step, position, batch_size, L)  # (B,), (B, L)
    return diffusion.draw_mask(objective, u, noise, schedule)


def concrete_score(log_p, m):
    """(1 - m)/m * p(x0_i = v | visible): log_p (..., V), m -> (..., V). RADD Theorem 1, eq. 3.2."""
    return (1 - m) / m * log_p.exp()


def score_entropy(log_score, x0, m, dm):
    """Denoising score entropy (DSE) of masked positions, in nats: log_score (..., V), x0 (...).

    RADD eq. 2.11, from SEDD (arXiv 2310.16834). With score = (1 - m)/m e^logit it is
    dm/m * (-logit[x0] + sum_v e^logit_v - 1). Where the logits are log-probabilities the sum is 1,
    and what is left is the weighted cross-entropy of t_dce. dm / (1 - m) is the slope of sigma_bar.
    """
    ratio = (1 - m) / m  # the true score: `ratio` at the clean token, 0 elsewhere
    at_x0 = log_score.gather(-1, x0[..., None]).squeeze(-1)
    return dm / (1 - m) * (log_score.exp().sum(-1) - ratio * at_x0 + ratio * (ratio.log() - 1))


@pytest.fixture
def joint():
    return random_joint()


@pytest.fixture
def network(joint):
    """A Table that knows the true conditionals of `joint`."""
    return Table(true_conditionals(joint))


@pytest.fixture
def arbitrary():
    """A Table of random conditionals that agree with no joint; its logits are log-probabilities."""
    return Table(random_logits().log_softmax(-1))


@pytest.fixture
def one_thread(monkeypatch):
    """One thread, so that sums have one order; and no time spent on measuring the machine."""
    monkeypatch.setattr("run.log.matmul_flops", lambda *_: 1e9)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def shared():
    """shared(NAME) -> Path in the folder NANOMDM_SHARED (default: shared/ beside the repository).

    Without it the test is skipped, but where the variable is set, as in .ci/run, a file that is
    missing is a failure.
    """

    def path(name):
        there = (ROOT / os.environ.get("NANOMDM_SHARED", "../shared") / name).resolve()
        if not there.exists():
            assert "NANOMDM_SHARED" not in os.environ, (
                f"NANOMDM_SHARED is set, and there is no {there}"
            )
            pytest.skip(f"needs {there}; set NANOMDM_SHARED to the folder that holds {name}")
        return there

    return path


def copied(source, to, *names):
    """The folder `to`, made with copies of these files."""
    to.mkdir()
    for name in names:
        (to / name).write_bytes((source / name).read_bytes())
    return to


@pytest.fixture
def radd(shared, tmp_path):
    """A folder that may be changed: RADD's config.json and model.safetensors."""
    names = ["config.json", "model.safetensors"]
    return copied(shared("fixtures/radd_tiny"), tmp_path / "radd", *names)


@pytest.fixture
def smdm(shared, tmp_path):
    """A folder that may be changed: SMDM's mdm.safetensors, ar.safetensors and a config.json."""
    names = ["config.json", "mdm.safetensors", "ar.safetensors"]
    return copied(shared("fixtures/smdm_tiny"), tmp_path / "smdm", *names)


@pytest.fixture(scope="session")
def chromium(tmp_path_factory):
    """The one browser of all tests of pages; each opens its own."""
    browser = pages.Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.process.kill()
    browser.process.wait()


@pytest.fixture(scope="session")
def demo(chromium, tmp_path_factory):
    """(chromium, model, tokenizer, the path of its page)."""
    model, tokenizer = pages.network()
    path = pages.written(tmp_path_factory.mktemp("page") / "page.html", model, tokenizer)
    return chromium, model, tokenizer, path


def predict(model, x, masked_idx, cond, cfg_scale=0.0):
    """Logits (N, V) at positions masked_idx (N,) of x (B, L), guided by x where cond (B, L)."""
    hs = diffusion.states(model, x, masked_idx, cond, cfg_scale)  # one or two of (N, D)
    return diffusion.guided(model, hs, cfg_scale)
