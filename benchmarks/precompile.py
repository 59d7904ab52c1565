"""Compile all that a library's autotuners are about to try, on all processor cores, before they try it.

An autotuner of Triton compiles its configurations one after the other and times each. Only the timing needs a quiet GPU.
`precompile(f)` calls f once without starting a kernel, notes what would be compiled, and lets forked processes fill Triton's
cache on disk with it. The first real call of f then finds everything compiled, times every configuration as always, and
takes whichever it would have taken.
"""
import multiprocessing
import os
import time

from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

SWITCHES = ("SAFE_GATE", "USE_SAFE_GATE", "USE_LOWER_BOUND")
jobs = []                                                # what forked processes inherit: they cannot be sent any of it
tuners, about = [], []


def tune_separately():
    """From here on an autotuner searches again where one of SWITCHES changes, or `tune_for` names another purpose, also if its
    author did not make that a key: what is fastest for many short sequences need not be for a long one."""
    init, on_disk = Autotuner.__init__, Autotuner.check_disk_cache

    def with_switches(self, fn, arg_names, configs, key, *args, **kwargs):
        init(self, fn, arg_names, configs, [*key, *(s for s in SWITCHES if s in arg_names and s not in key)], *args, **kwargs)
        tuners.append(self)

    def with_purpose(self, key, *args):
        result = on_disk(self, (*key, *about), *args)
        if (*key, *about) in self.cache: self.cache[key] = self.cache[(*key, *about)]       # found on disk, under its own key
        return result
    Autotuner.__init__, Autotuner.check_disk_cache = with_switches, with_purpose


def tune_for(*purpose):
    "Forgets what was found for another purpose; what was found for this one may be on disk."
    if purpose == tuple(about): return
    about[:] = purpose
    for tuner in tuners: tuner.cache.clear()


def collect(f):
    "What a call of f would compile, all configurations of autotuners included; no kernel is started."
    found, names = {}, ("run", "_do_compile")
    originals = Autotuner.run, *(getattr(JITFunction, name) for name in names)

    def all_configs(self, *args, **kwargs):
        self.nargs = dict(zip(self.arg_names, args))
        for config in self.prune_configs(kwargs): self.fn.run(*args, **kwargs | config.all_kwargs())

    def never_start(self, *args, **kwargs): return originals[1](self, *args, **kwargs | {"warmup": True})

    def note(self, key, signature, device, constexprs, options, attrs, warmup):
        target = self.device_caches[device][2]
        found[id(self), key] = self.compile, self.ASTSource(self, signature, constexprs, attrs), target, options.__dict__

    Autotuner.run, JITFunction.run, JITFunction._do_compile = all_configs, never_start, note
    try: f()
    finally: Autotuner.run, JITFunction.run, JITFunction._do_compile = originals
    return list(found.values())


def build(i):
    "Seconds that job i took. What cannot be compiled is left to the autotuner, which knows what to make of it."
    compile, source, target, options = jobs[i]
    start = time.perf_counter()
    try: compile(source, target=target, options=options)
    except Exception: pass
    return time.perf_counter() - start


def precompile(f):
    "Fills the cache for f. How many compilations, the sum of their seconds, and the seconds that passed."
    start = time.perf_counter()
    jobs[:] = collect(f)
    if not jobs: return dict(compiled=0, compile_s=0.0, precompile_s=time.perf_counter() - start)
    with multiprocessing.get_context("fork").Pool(min(len(jobs), os.cpu_count())) as pool:
        seconds = sum(pool.imap_unordered(build, range(len(jobs))))
    return dict(compiled=len(jobs), compile_s=seconds, precompile_s=time.perf_counter() - start)
