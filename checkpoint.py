"""Weights files: our own checkpoints, published ones in any wrapping, and ids on the Hugging Face hub.

Our own is one safetensors file: the weights under their own names, the model's config as JSON metadata and, under
"train.", whatever the training loop needs to go on. Others are a Lightning .ckpt, a bare state dict (.pt, .pth, .bin)
or a bare .safetensors. Nothing in a file is ever executed.
"""
import functools
import glob
import json
import math
import os
import pickle
import re
import zipfile
from collections import namedtuple
from dataclasses import asdict

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from model import NanoWM, NanoWMConfig

SUFFIXES = ('.safetensors', '.ckpt', '.pt', '.pth', '.bin')  # in order of preference
# Lightning compiled and eager, bare compiled, in DDP and eager
PREFIXES = ('model._orig_mod.', 'model.', '_orig_mod.', 'module.', '')
OTHERS = r'vae\.|.*(rope|rotary|freq|_cos$|_sin$)'  # an autoencoder beside the model, rotary tables


def save_checkpoint(path, state, config, **meta):
    """Write tensors `state` {name: tensor} with the model `config` and JSON-able `meta` to `path`, atomically."""
    state = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    info = {'config': json.dumps(asdict(config)), 'meta': json.dumps(meta)}
    tmp = f'{path}.tmp'  # a kill leaves the old file or the new
    save_file(state, tmp, metadata=info)
    with open(tmp, 'rb') as f:
        os.fsync(f.fileno())
    os.chmod(tmp, 0o644)  # save_file leaves it readable by its owner only
    os.replace(tmp, path)


def read_checkpoint(path, train=False):
    """(state, config, meta) of a file, folder or hub id; (state, None, {}) if train.py did not write it.

    train=True adds the tensors under "train.". Raises FileNotFoundError or ValueError with one line on what to do.
    """
    path = find(path)
    config, meta = None, {}
    try:
        if path.endswith('.safetensors'):
            with safe_open(path, 'pt') as f:
                info, names = f.metadata() or {}, model_names(f.keys())
                if 'meta' in info:
                    config, meta = NanoWMConfig(**json.loads(info['config'])), json.loads(info['meta'])
                    names = {k: k for k in f.keys() if train or not k.startswith('train.')}
                state = {name: f.get_tensor(k) for name, k in names.items()}
        else:
            state = read_pickle(path)
    except Exception as e:  # a broken or hostile file can raise anything
        kind = 'safetensors' if path.endswith('.safetensors') else 'PyTorch (1.6 or newer)'
        why = ' '.join(f'{type(e).__name__}: {e}'.split())
        raise ValueError(f'{path} is not a readable {kind} file ({why}); restore it or use another one') from e
    if not state:
        raise ValueError(f'{path} holds no weights of a NanoWM: x_embedder.proj.weight is missing')
    if train and not config:
        raise ValueError(f'{path} was not written by train.py: start from it with --init_from, not --resume')
    return state, config, meta


def load_model(path, device='cpu', injection=None, causal=None):
    """The model of a checkpoint (its EMA weights if it is ours), in eval mode, and the metadata saved beside it.

    injection and causal help config_of with files that train.py did not write. Raises as read_checkpoint does.
    """
    state, config, meta = read_checkpoint(path)
    try:
        model = NanoWM(config or config_of(state, injection, causal))
    except ValueError as e:
        raise ValueError(f'{path}: {e}') from e
    load_weights(model, state, path)
    return model.to(device).eval(), meta


def load_weights(model, state, path):
    """load_state_dict(strict=True) with an error of one line: which file, which tensors, which shapes."""
    want = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    have = {k: tuple(v.shape) for k, v in state.items()}
    wrong = [f'{k} is {have.get(k, "missing")}, not {want.get(k, "expected")}'
             for k in sorted({*want, *have}) if want.get(k) != have.get(k)]
    if wrong:
        more = f' and {len(wrong) - 10} more' if len(wrong) > 10 else ''
        raise ValueError(f'{path} does not fit this model: {"; ".join(wrong[:10])}{more}')
    model.load_state_dict(state)


# -----------------------------------------------------------------------------
# files that others wrote

def model_names(keys):
    """{parameter's name: its key in the file}; {} if there is no NanoWM in it."""
    for prefix in PREFIXES:
        if f'{prefix}x_embedder.proj.weight' in keys:
            return {k[len(prefix):]: k for k in keys if re.match(f'{re.escape(prefix)}(?!{OTHERS})', k)}
    return {}


def config_of(state, injection=None, causal=None):
    """The NanoWMConfig of weights {name: tensor}, for square frames. Raises ValueError if they do not tell.

    Tensors look the same with injection additive and adaln_fuse, and causal or not: None is additive, and causal.
    """
    marks = {'action_adaLN': 'adaln', 'film': 'film', 'cross_attn': 'cross_attention'}
    seen = (name for mark, name in marks.items() if any(mark in k for k in state))
    try:
        D, channels, patch_size, _ = state['x_embedder.proj.weight'].shape
        action = state.get('action_embedder.mlp.0.weight', torch.empty(D, 0))
        return NanoWMConfig(
            input_size=math.isqrt(state['pos_embed'].shape[1]) * patch_size, patch_size=patch_size,
            in_channels=channels, hidden_size=D, num_heads=D // len(state['blocks.0.attn.q_norm.weight']),
            depth=len({k.split('.')[1] for k in state if k.startswith('blocks.')}), action_dim=action.shape[1],
            num_frames=state['temp_embed'].shape[1], injection=injection or next(seen, 'additive'),
            causal=causal is not False)
    except KeyError as e:
        raise ValueError(f'{e} is missing, so the shape of the model is not known') from e


class Inert(dict):
    """What every class and function that a pickle names becomes: it keeps items given to a dict, and does nothing."""
    __hash__ = object.__hash__
    __init__ = __setstate__ = append = extend = add = lambda *_, **__: None
    __call__ = lambda *_, **__: Inert()  # noqa: E731


Tensor = namedtuple('Tensor', 'storage size stride offset')  # of a pickle, not read yet


class Unpickler(pickle.Unpickler):
    """Reads what torch.save pickled; neither imports nor calls anything that the file names."""
    dtypes = {'Float': torch.float32, 'Half': torch.float16, 'BFloat16': torch.bfloat16, 'Double': torch.float64,
              'Long': torch.int64, 'Int': torch.int32, 'Short': torch.int16, 'Char': torch.int8, 'Byte': torch.uint8,
              'Bool': torch.bool}

    def find_class(self, module, name):
        if module == 'torch' and name.removesuffix('Storage') in self.dtypes:
            return self.dtypes[name.removesuffix('Storage')]
        if module == 'torch._utils' and name == '_rebuild_tensor_v2':
            return lambda storage, offset, size, stride, *_: Tensor(storage, size, stride, offset)
        if module == 'torch._utils' and name.startswith('_rebuild_parameter'):
            return lambda tensor, *_: tensor
        return Inert if name != 'getattr' else lambda *_: Inert  # it is how a class inside a class is found

    def persistent_load(self, pid):
        return pid[1:3]  # dtype and key of a storage


def read_pickle(path):
    """The model's {name: tensor} in a file of torch.save; what else it holds is not read."""
    with zipfile.ZipFile(path) as archive:
        index = next(n for n in archive.namelist() if n.endswith('/data.pkl'))
        tree = Unpickler(archive.open(index)).load()
        tree = tree.get('state_dict') or tree.get('model') or tree
        tensors = {k: v for k, v in tree.items() if isinstance(k, str) and isinstance(v, Tensor)}

        @functools.cache  # tensors may share a storage
        def read(dtype, key):
            return torch.frombuffer(bytearray(archive.read(index.removesuffix('.pkl') + f'/{key}')), dtype=dtype)

        names = model_names(tensors)
        return {name: read(*tensors[k].storage).as_strided(*tensors[k][1:]) for name, k in names.items()}


# -----------------------------------------------------------------------------
# finding a file

def choose(names, suffixes=SUFFIXES):
    """The file to use of many: of the first suffix that occurs, the one called latest or last, else the one with the
    largest number (of steps) in its name; '' if there is none."""
    def rank(name):
        base = os.path.basename(name)
        return bool(re.search('la(te)?st', base)), [int(d) for d in re.findall(r'\d+', base)]

    found = ([n for n in names if n.endswith(suffix)] for suffix in suffixes)
    return max(next(filter(None, found), ['']), key=rank)


def find(path):
    """The weights file that a file, a folder or a hub id means. Raises FileNotFoundError."""
    if os.path.isdir(path):
        if name := choose(glob.glob('**', root_dir=path, recursive=True)):
            name == 'latest.safetensors' or print(f'{path}: using {name}')
            return os.path.join(path, name)
    elif os.path.exists(path):
        return path
    elif re.fullmatch(r'(?!out/)[\w-][\w.-]*/[\w.-]+', path) and not path.endswith(SUFFIXES):
        return hub_file(path)
    raise FileNotFoundError(f'no checkpoint at {path}: train one with python train.py, or check --ckpt')


def hub_file(repo_id, suffixes=SUFFIXES):
    """Local path of the file that `choose` takes from a Hugging Face repository; ends with one line if it cannot."""
    try:
        import huggingface_hub as hub
    except ImportError as e:
        raise SystemExit(f'{repo_id} is not here; to ask the Hugging Face hub: pip install huggingface_hub') from e
    try:
        if not (name := choose([f.rfilename for f in hub.model_info(repo_id).siblings], suffixes)):
            raise FileNotFoundError(f'none of its files ends in {", ".join(suffixes)}')
        print(f'{repo_id}: using {name}')
        return hub.hf_hub_download(repo_id, name)
    except Exception as e:  # its own, the HTTP library's or the system's
        why = str(e).strip().partition('\n')[0] or type(e).__name__
        raise SystemExit(f'{repo_id} is neither here nor to be had from the Hugging Face hub: {why}') from e
