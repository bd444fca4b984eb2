"""Runs Triton launchers in Triton's interpreter for the tests: pickled requests on stdin, results on stdout.

A separate process, because the interpreter is chosen by an environment variable when Triton is first
imported, while the compile tests and the GPU tests in the same pytest run need the real compiler.
"""

import importlib
import os
import pickle
import sys

os.environ["TRITON_INTERPRET"] = "1"
results = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
sys.stdout = sys.stderr  # a stray print must not corrupt the stream


def mend_interpreter() -> None:
    """triton before 3.7 takes `int()` of arrays of one element, which numpy refuses from 2.4 on."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor, *scope):
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    interpreter._patch_lang_tensor = patch_and_mend


mend_interpreter()

while True:
    try:
        module, function, arguments, options = pickle.load(sys.stdin.buffer)
    except EOFError:
        break
    try:
        answer = getattr(importlib.import_module(module), function)(*arguments, **options)
        answer = arguments if answer is None else answer
    except Exception as error:
        answer = error
    pickle.dump(answer, results)
    results.flush()
