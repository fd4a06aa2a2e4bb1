"""Does a run on two hosts survive the end of one? Two network namespaces of this machine are hosts.

    python -m experiments.two_hosts                      needs Linux, root and the command ip
    unshare --map-root-user --net --mount sh -c "mount -t tmpfs none /run;
        python -m experiments.two_hosts"                 without root, where the system allows it

A cable (veth) between them is all that they share beside the file system. torchrun starts train.py
on both, as configs/slurm.sh does, and they meet at the first. Then one is killed; or it vanishes:
its cable is pulled before its processes are killed, so that the other never hears of it. torchrun
is started again with the same command: in place of the second alone, which, having vanished, comes
back with another address; in place of the first, where they met, on both. In the end the weights,
averages, optimizer state and losses have to be those of a run on two hosts that nobody disturbed,
bit for bit; or, where the number of processes changes at each start, the weights those of one
process, up to rounding.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import config as settings
from experiments import results, survive
from lib import program
from run import checkpoint

DEFAULTS = {
    "steps": 400,  # of the run; 40 or more
}

PORT, PATIENCE = 29500, 180  # PATIENCE: seconds until something that should happen has not
KEYS = {"batch_size": 12, "dropout": 0.0, "save_interval": 10, "optimizer": "adamw"}
# What happens, and with how many processes the hosts go on where these are to change.
EVENTS = {
    "the second is killed": (1, False, (1, 2)),
    "the second vanishes": (1, True, (1, 1)),
    "the first vanishes": (0, True, (2, 2)),
}


class Host:
    """A network namespace with one end of the cable."""

    def __init__(self, number):
        self.name, self.address = f"nanomdm_{os.getpid()}_{number}", f"10.77.0.{number + 1}"
        self.is_first, self.torchrun = number == 0, None

    def link(self, state):
        ip("-n", self.name, "link", "set", "eth0", state)

    def move(self, address):
        """Give the host this address and no other."""
        self.address = address
        ip("-n", self.name, "addr", "flush", "dev", "eth0")
        ip("-n", self.name, "addr", "add", f"{address}/24", "dev", "eth0")

    def start(self, run, processes):
        """Plug the cable in and start torchrun with so many processes of the run."""
        self.link("up")
        line = ["ip", "netns", "exec", self.name, sys.executable, "-m", "torch.distributed.run"]
        line += ["--nnodes=2", f"--nproc-per-node={processes}", "--max-restarts=9"]
        line += ["--rdzv-backend=c10d", f"--rdzv-endpoint=10.77.0.1:{PORT}", "--rdzv-id=run"]
        # Names of hosts are not known in a namespace, so they are told who they are.
        line += [f"--rdzv-conf=is_host={self.is_first}", f"--local-addr={self.address}"]
        line += ["train.py", *(f"--{key}={value}" for key, value in run.items())]
        variables = {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
        variables["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # as in configs/slurm.sh
        with open(output_of(run), "a", encoding="utf8") as file:
            keys = {"stdout": file, "stderr": file, "env": os.environ | variables}
            self.torchrun = subprocess.Popen(line, **keys)

    def die(self, unseen=False):
        """Kill all that runs here; unseen: without a word to the other host."""
        if unseen:
            self.link("down")
        while pids := ip("netns", "pids", self.name).split():
            for pid in map(int, pids):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        if self.torchrun:
            self.torchrun.wait()


def ip(*words):
    """What the command ip prints; UserError for what it refuses."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    refused = f"ip {' '.join(words)}: {done.stderr.strip()}; two hosts need Linux and root"
    settings.require(done.returncode == 0, refused)
    return done.stdout


@contextlib.contextmanager
def two_hosts():
    """Both, with a cable between; in the end nothing runs there, and they are gone."""
    settings.require(shutil.which("ip"), "there is no command ip; Linux has it, in iproute2")
    with contextlib.ExitStack() as opened:
        hosts = [Host(number) for number in range(2)]
        for host in hosts:
            ip("netns", "add", host.name)
            opened.callback(ip, "netns", "del", host.name)
        a, b = (host.name for host in hosts)
        ip("link", "add", "eth0", "netns", a, "type", "veth", "peer", "name", "eth0", "netns", b)
        for host in hosts:
            opened.callback(host.die)
            host.move(host.address)
            host.link("up")
            ip("-n", host.name, "link", "set", "lo", "up")
        yield hosts


def start(hosts, run, counts):
    """torchrun on these hosts, with so many processes on each of them."""
    for host, count in zip(hosts, counts, strict=True):
        host.start(run, count)


def trained(hosts, run, events, changing=False):
    """Train on both hosts to the end, while the events happen -> a row for each of these.

    changing: the number of processes does.
    """
    rows, counts, every = [], [1, 1], run["max_iters"] / (len(events) + 1)
    start(hosts, run, counts)
    for number, event in enumerate(events, 1):
        who, unseen, then = EVENTS[event]
        until(run, lambda n=number: last_step(run) > n * every)
        hosts[who].die(unseen)
        saved, reached, began = checkpoint.read(run["out_dir"])["step"], last_step(run), time.time()
        if who == 0:  # where they meet is gone, so what runs the job, as Slurm, ends it
            hosts[1].die()
        elif unseen:
            hosts[who].move("10.77.0.3")  # that of another machine, put in its place
        counts = then if changing else counts
        start(hosts[who:], run, counts[who:])
        until(run, lambda step=reached: last_step(run) > step)
        row = {"event": event, "then_processes": " + ".join(map(str, counts)), "at_step": reached}
        rows.append(row | {"resumed_at": saved, "seconds": time.time() - began})
        print(*rows[-1].values(), sep="; ", flush=True)
    finish(hosts, run)
    return rows


def finish(hosts, run):
    """Wait for the end of both."""
    until(run, lambda: all(host.torchrun.poll() is not None for host in hosts))
    codes = [host.torchrun.returncode for host in hosts]
    settings.require(codes == [0, 0], f"the hosts ended with {codes}: {tail(run)}")


def last_step(run):
    """The step of the last entry in the run's log, 0 where there is none."""
    return max((entry["step"] for entry in results.kept(run["out_dir"] / "log.jsonl")), default=0)


def until(run, condition):
    """Wait until the condition holds; UserError with what the run has said if it never does."""
    began = time.time()
    while not condition():
        settings.require(time.time() - began < PATIENCE, f"no end of waiting: {tail(run)}")
        time.sleep(0.02)


def tail(run):
    """The last that torchrun and train.py have said."""
    return output_of(run).read_text("utf8")[-800:]


def output_of(run):
    return run["out_dir"].with_suffix(".txt")


def difference(a, b):
    """The largest between two {name: tensor}."""
    return max((a[name] - b[name]).abs().max().item() for name in a)


def main(config):
    """Print, write and return {identical, difference, ...}."""
    began, events = time.time(), list(EVENTS)[: 1 if config["quick"] else None]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or the hosts would be left
    with tempfile.TemporaryDirectory() as folder, two_hosts() as hosts:
        keys = survive.keys_of(config, Path(folder)) | KEYS
        names = ("one process", "two hosts", "disturbed", "changing")
        one, two, parts, changing = (keys | {"out_dir": Path(folder, name)} for name in names)
        survive.leave_alone(survive.run_of(one))
        trained(hosts, two, [])
        rows = trained(hosts, parts, events) + trained(hosts, changing, events, changing=True)
        outcomes = [survive.outcome(run["out_dir"]) for run in (one, two, parts, changing)]
    identical = survive.same(outcomes[1], outcomes[2])
    off = difference(outcomes[0]["model"], outcomes[3]["model"])
    figures = {"identical": identical, "difference": off, "seconds": time.time() - began}
    figures |= results.about(torch.device("cpu"))
    text = results.table(f"A run of {config['steps']} steps on two hosts", rows)
    text += f"\nOne process on each, and two hosts that nobody disturbed: identical {identical}.\n"
    text += f"Changing numbers, and one process: weights differ by {off:.1e}.\n"
    results.write(config, "two_hosts", figures, text)
    print(text)
    return figures


if __name__ == "__main__":
    program.run(main, settings, results, sys.modules[__name__])
