"""What the tests of view/ share: a network on its page, and a real browser that opens it.

The browser is a headless Chromium, driven over the DevTools protocol by a pipe. Where it is not
installed its tests are skipped, but where NANOMDM_SHARED is set, as in .ci/run, they fail.
"""

import json
import os
import shutil
import subprocess
import time

import pytest
import torch
from plain import DEFAULTS

import sample
from data.tokenizer import Char
from model import make_network
from view import page

TEXT = "the cat sat on a mat and ran"
ALPHABET = "\n " + "".join(sorted(set("the cat sat on a mat and ran_0123456789") - {" "}))
KINDS = {
    "demo": {"norm": "rms", "bias": False, "qk_norm": True},
    "radd": {"norm": "layer", "bias": True},
    "smdm": {"norm": "rms", "bias": False, "mlp": "swiglu", "mlp_width": 40},
    "relu2": {"norm": "layer", "bias": False, "mlp": "relu2"},
    "order": {"norm": "rms", "bias": False, "qk_norm": True, "attention": "order"},
}
# Of the samplers the page has all but those that take tokens back.
ON_PAGE = [name for name in sample.SAMPLERS if name not in ("remask", "remask_rescale")]
OPEN = ("threshold", "entropy_bound")  # how many calls they take depends on the network
HOSTILE = [
    "<script>window.hacked = 1</script>",
    "</script><script>hacked = 1",
    "<img src=x onerror=hacked=1>",
]
HOSTILE += ["&lt;b&gt;", "<!--", "]]>", "{{data}}", "\u2028", "\0", "a"]


class Browser:
    """Chromium with one tab; `js` evaluates, `events` is all that the tab has told."""

    def __init__(self, folder):
        program = shutil.which("chromium") or shutil.which("chromium-browser")
        if not program:
            assert "NANOMDM_SHARED" not in os.environ, "NANOMDM_SHARED is set, but no chromium here"
            pytest.skip("needs chromium")
        there, self.out = os.pipe()
        self.back, here = os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        flags += [f"--user-data-dir={folder}", "--hide-scrollbars"]
        command = ["bash", "-c", f'exec "$@" 3<&{there} 4>&{here}', "bash", program, *flags]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, pass_fds=(there, here), **quiet)
        os.close(there)
        os.close(here)
        self.number, self.rest, self.session, self.events = 0, b"", {}, []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": session["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.send("Emulation.setFocusEmulationEnabled", enabled=True)

    def send(self, method, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params} | self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                piece = os.read(self.back, 2**16)
                assert piece, "the browser is gone"
                self.rest += piece
            line, self.rest = self.rest.split(b"\0", 1)
            answer = json.loads(line)
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def js(self, code):
        options = {"awaitPromise": True, "returnByValue": True}
        answer = self.send("Runtime.evaluate", expression=code, **options)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def call(self, function, *values):
        """function(*values) in the page: the values travel as JSON."""
        return self.js(f"({function})({', '.join(json.dumps(value) for value in values)})")

    def until(self, condition):
        end = time.time() + 60
        while not self.js(f"!!({condition})"):
            assert time.time() < end, f"never: {condition}"
            time.sleep(0.02)

    def open(self, path, width=1200, mobile=False, **media):
        media = {"prefers-reduced-motion": "reduce"} | media  # so that nothing plays by itself
        features = [{"name": name, "value": value} for name, value in media.items()]
        self.send("Emulation.setEmulatedMedia", features=features)
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": mobile}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        self.events.clear()
        self.send("Page.navigate", url=path.as_uri())
        self.until("document.readyState === 'complete'")

    def mouse(self, selector, *kinds):
        """A real pointer at the middle of what `selector` (JavaScript) names."""
        box = (
            f"(e => (e.scrollIntoView({{block: 'center'}}), e.getBoundingClientRect()))({selector})"
        )
        x, y = self.js(f"(b => [b.x + b.width / 2, b.y + b.height / 2])({box})")
        for kind in kinds or ("mouseMoved", "mousePressed", "mouseReleased"):
            press = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, **press)

    def key(self, name, code=0):
        for kind in ("keyDown", "keyUp"):
            key = {"key": name, "code": name, "windowsVirtualKeyCode": code}
            self.send("Input.dispatchKeyEvent", type=kind, **key)

    def complaints(self):
        """Exceptions and messages of the console, and whatever was asked of a network."""
        bad = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        asked = [e for e in self.events if e["method"] == "Network.requestWillBeSent"]
        urls = [e["params"]["request"]["url"] for e in asked]
        own = [url for url in urls if url.startswith(("file:", "data:"))]
        return [e for e in self.events if e["method"] in bad] + [u for u in urls if u not in own]


def network(kind="demo", alphabet=ALPHABET, **keys):
    """(model, tokenizer): random, of rounded weights, and sharp enough that context matters."""
    torch.manual_seed(1)
    keys = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 40} | KINDS[kind] | keys
    model = make_network(DEFAULTS | keys | {"vocab_size": len(alphabet)}).eval()
    with torch.no_grad():
        for name, w in model.named_parameters():
            if w.dim() == 1:
                w.add_(0.3 * torch.randn(w.shape))
            w.mul_(3.0 if "embed" in name else 1.5)
    model.load_state_dict(page.pack(model)[1])
    return model, Char(alphabet)


def options(**keys):
    return page.settings.options(keys, *sample.MODULES)


def written(path, model, tokenizer, template="the ___8 sat on ___4."):
    data = page.with_weights((model, tokenizer, {}), {"template": template.replace(".", "")})
    path.write_text(page.html(data, ""), encoding="utf8")
    return path


def start_of(tokenizer, model):
    ids = tokenizer.encode(TEXT)
    return [model.mask_id if 4 <= i < 15 or 20 <= i < 26 else v for i, v in enumerate(ids)]


def partly_masked(model, rows, L):
    """x (rows, L): of every degree, from one mask to masks alone."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(model.vocab_size, (rows, L), generator=generator)
    for i, row in enumerate(x):
        n = 1 + i * (L - 1) // (rows - 1)
        row[torch.randperm(L, generator=generator)[:n]] = model.mask_id
    return x


def differences(chromium, model, x):
    """The largest difference between the page's logits and PyTorch's, of each row of x."""
    worst = []
    for row in x:
        masked = (row == model.mask_id).nonzero().flatten()
        ask = "(x, at) => logits(network, x, at).map((row) => [...row])"
        ours = torch.tensor(chromium.call(ask, row.tolist(), masked.tolist()))
        with torch.no_grad():
            worst.append(float((ours - model(row[None])[0, masked]).abs().max()))
    return worst


def shown(chromium):
    """What each token of the first sample shows: its classes and its text."""
    return chromium.js("page.boards[0].spans.map((s) => [s.className, s.textContent])")


def finish(chromium):
    chromium.js("playing(false), seek(page.steps)")


def masked_now(chromium):
    return [i for i, (name, _) in enumerate(shown(chromium)) if name == "hole"]
