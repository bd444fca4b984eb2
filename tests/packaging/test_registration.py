"""`import slicegpt` makes the Auto classes know sliced models, whichever package comes first, and is light.

Each order needs an interpreter of its own, which takes seconds: what can share one does.
"""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from support.sliced_models import network
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

import slicegpt


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sliced") / "model"
    network("llama", "compact", torch.float32).save_pretrained(path)
    return path


def run(code: str, *arguments: object, path: object = None) -> tuple[str, str]:
    """What a fresh interpreter prints, to standard output and standard error."""
    environment = dict(os.environ)
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(path), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_import_is_light():
    """Neither of the two, nor numpy; every public name is there, and the class that the Auto class gives is ours."""
    code = """
        import sys
        import slicegpt
        assert not {"torch", "transformers", "numpy"} & set(sys.modules), sorted(sys.modules)
        assert set(slicegpt.__all__) <= set(dir(slicegpt))
        assert issubclass(slicegpt.SliceGPTError, ValueError)
        try:
            slicegpt.nothing
        except AttributeError as error:
            assert str(error) == "module 'slicegpt' has no attribute 'nothing'"
        assert "torch" not in sys.modules
        print("light")
    """
    assert run(code)[0] == "light\n"


def test_all_names_resolve():
    assert all(getattr(slicegpt, name) is not None for name in slicegpt.__all__)
    assert slicegpt.SlicedConfig.__module__ == "slicegpt.modeling.configuration"
    assert slicegpt.modeling.SlicedForCausalLM is slicegpt.SlicedForCausalLM
    assert MODEL_MAPPING[slicegpt.SlicedConfig] is slicegpt.modeling.SlicedModel
    assert MODEL_FOR_CAUSAL_LM_MAPPING[slicegpt.SlicedConfig] is slicegpt.SlicedForCausalLM


LOAD = """
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    assert type(model).__module__ == "slicegpt.modeling.network", type(model)
    assert type(AutoModel.from_pretrained(sys.argv[1])).__name__ == "SlicedModel"
    print(type(model).__name__)
"""


@pytest.mark.parametrize(
    "imports",
    [
        # Llama's module comes to AutoModel through transformers.modeling_layers, which is half executed by then.
        "import sys, slicegpt; from transformers import LlamaForCausalLM, AutoModel, AutoModelForCausalLM",
        "import sys; from transformers import AutoModel, AutoModelForCausalLM; import slicegpt",
        # The network is imported first, and the Auto classes on its way; no package is imported by its own name.
        "import sys; from slicegpt import SlicedForCausalLM; from transformers import AutoModel, AutoModelForCausalLM",
    ],
)
def test_models_load_in_any_order(folder, imports):
    assert run(f"{imports}\n{textwrap.dedent(LOAD)}", folder)[0] == "SlicedForCausalLM\n"


def test_stand_ins_then_threads_then_another_process(folder):
    """No import of an Auto class imports our network; threads that import at once from several ends all find it; so
    does a process that is spawned with nothing but a config in its pickled arguments."""
    code = """
        import importlib.machinery, multiprocessing, pickle, spawned, sys, threading
        import transformers
        import slicegpt

        def network():
            return slicegpt.SlicedForCausalLM.__name__

        def llama():
            from transformers import LlamaForCausalLM
            return "SlicedForCausalLM"

        if __name__ == "__main__":
            from transformers import AutoConfig, MODEL_FOR_CAUSAL_LM_MAPPING
            config = AutoConfig.from_pretrained(sys.argv[1])
            assert type(config) is slicegpt.SlicedConfig
            stand_in = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
            assert stand_in.__name__ == "SlicedForCausalLM"
            assert "slicegpt.modeling.network" not in sys.modules
            module = sys.modules["transformers.models.auto.modeling_auto"]
            assert isinstance(module.__spec__.loader, importlib.machinery.SourceFileLoader)
            assert module.__loader__ is module.__spec__.loader
            found, wait = [], threading.Barrier(6)
            def work(what):
                wait.wait()
                found.append(what())
            ends = [lambda: spawned.build(config), network, llama] * 2
            threads = [threading.Thread(target=work, args=(what,)) for what in ends]
            for thread in threads: thread.start()
            for thread in threads: thread.join()
            assert found == ["SlicedForCausalLM"] * 6, found
            assert MODEL_FOR_CAUSAL_LM_MAPPING[type(config)] is slicegpt.SlicedForCausalLM
            assert pickle.loads(pickle.dumps(stand_in)) is slicegpt.SlicedForCausalLM
            assert type(stand_in(config)) is slicegpt.SlicedForCausalLM
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                print(pool.apply(spawned.build, (config,)))
    """
    worker = folder.parent / "spawned.py"
    # No import of slicegpt: the pickled config alone brings it along.
    worker.write_text(
        "def build(config):\n"
        "    from transformers import AutoModelForCausalLM\n"
        "    return type(AutoModelForCausalLM.from_config(config)).__name__\n"
    )
    assert run(code, folder, path=folder.parent)[0] == "SlicedForCausalLM\n"


def test_broken_packages_are_left_alone(tmp_path):
    """Whoever imports transformers gets its own error, or the module; of ours, one line in the log, and at use the
    error itself."""
    auto = tmp_path / "transformers" / "models" / "auto"
    auto.mkdir(parents=True)
    for package in (auto, auto.parent, auto.parent.parent):
        (package / "__init__.py").write_text("")
    (auto / "configuration_auto.py").write_text("class AutoConfig: pass\n")
    (auto / "modeling_auto.py").write_text("raise ImportError('half installed')\n")
    (tmp_path / "torch.py").write_text("raise ImportError('no libcuda')\n")
    code = """
        import slicegpt
        from transformers.models.auto.configuration_auto import AutoConfig
        try:
            import transformers.models.auto.modeling_auto
        except ImportError as error:
            assert str(error) == "half installed"
        try:
            slicegpt.SlicedForCausalLM
        except ImportError as error:
            assert str(error) == "no libcuda"
        else:
            raise AssertionError
        print("alone")
    """
    printed, logged = run(code, path=tmp_path)
    assert printed == "alone\n"
    assert logged.startswith("transformers' Auto classes cannot load sliced models: cannot import name")
    assert logged.count("\n") == 1
    (auto.parent.parent / "__init__.py").write_text("raise ImportError('broken')\n")
    code = """
        import slicegpt
        try:
            import transformers
        except ImportError as error:
            print(error)
    """
    assert run(code, path=tmp_path) == ("broken\n", "")
