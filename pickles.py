"""Pickles of strangers: the arrays and tensors in a .pkl, or in whatever torch.save wrote.

A pickle is a program for a small stack machine, and Python's own reader imports and calls whatever
the program names. This machine does not: the few functions that make arrays and tensors are
replaced by ours, and what any other would have made is `Inert`. Ours compare what the file claims
(shape, strides, dtype) with the bytes it really holds: no file can ask for more memory than its
size explains.
"""
import contextlib
import math
import os
import pickletools
import re
import zipfile
from types import SimpleNamespace

import numpy as np
import torch

from configurator import UserError

MAX_OPCODES = 2_000_000  # a large checkpoint has 100,000; each may take about 100 bytes
MAX_KEY = 1000  # characters of a key in a dict; the name of a parameter has fewer

# opcodes whose argument is the value itself, and those that mean one value
VALUES = {op.name for op in pickletools.opcodes
          if op.arg and op.stack_after and op.stack_after[0].obtype is not object}
CONSTANTS = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False, 'EMPTY_TUPLE': ()}
ALL = 'all above the last mark'
# how many objects an opcode takes from the stack
TAKE = {'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3, 'APPEND': 1, 'SETITEM': 2, 'BUILD': 1,
        'REDUCE': 2, 'NEWOBJ': 2, 'STACK_GLOBAL': 2, 'BINPERSID': 1,
        'TUPLE': ALL, 'LIST': ALL, 'DICT': ALL, 'APPENDS': ALL, 'SETITEMS': ALL}

STORAGES = {'Double': torch.float64, 'Float': torch.float32, 'Half': torch.float16,
            'BFloat16': torch.bfloat16, 'Long': torch.int64, 'Int': torch.int32,
            'Short': torch.int16, 'Char': torch.int8, 'Byte': torch.uint8, 'Bool': torch.bool}


class Inert(dict):
    """What an unknown class or function would have made; like an OrderedDict, it keeps items."""
    __slots__ = ()


class Machine:
    """Runs the pickle in the file at `path`, on its own or in the zip archive of torch.save."""

    def __init__(self, path):
        self.path = path
        # bytes that may be unpacked: an honest file holds each number once, those in the pickle
        # itself twice, there and in their array
        self.room = 2 * os.path.getsize(path)
        self.stack, self.marks = [], []
        self.memo = {}  # a dict: to put something at place 2**31 takes no room
        self.storages = {}
        self.known = {  # what stands for the classes and functions that a file may name
            ('_codecs', 'encode'): lambda text, *_: text,  # protocol 2's bytes; `array` makes them
            ('numpy', 'dtype'): lambda code, *_: SimpleNamespace(code=code, order='='),
            ('numpy', '_reconstruct'): lambda *_: np.empty(0, np.uint8),  # `build` fills it
            ('numpy', '_frombuffer'): self.array,
            ('numpy', 'scalar'): self.scalar,
            ('torch', '_rebuild_tensor_v2'): self.tensor,
            ('torch', '_rebuild_parameter'): lambda tensor, *_: tensor,
            ('torch', '_rebuild_parameter_with_state'): lambda tensor, *_: tensor,
        }
        for name, dtype in STORAGES.items():
            self.known['torch', f'{name}Storage'] = dtype

    def read(self):
        if not zipfile.is_zipfile(self.path):
            with open(self.path, 'rb') as f:
                return self.run(f.read())
        with zipfile.ZipFile(self.path) as archive:
            self.archive = archive
            indices = [name for name in archive.namelist() if name.endswith('/data.pkl')]
            self.index, *_ = indices  # torch.save writes one
            return self.run(self.unzip(self.index))

    def run(self, data):
        for count, (opcode, arg, position) in enumerate(pickletools.genops(data)):
            if count == MAX_OPCODES:
                raise ValueError(f'more than {MAX_OPCODES:,} opcodes')
            if opcode.name == 'STOP' and position + 1 < len(data):
                raise ValueError('more than one pickle, as PyTorch before 1.6 wrote')
            self.step(opcode.name, arg, self.take(TAKE.get(opcode.name, 0)))
        return self.stack.pop()

    def take(self, number):
        """The objects that an opcode works on, taken from the stack."""
        items = []
        if number == ALL:
            items, self.stack = self.stack, self.marks.pop()
        elif number:
            items = self.stack[-number:]
            del self.stack[-number:]
        return items

    def step(self, name, arg, items):
        push = self.stack.append
        match name:
            case _ if name in VALUES:
                push(arg)
            case _ if name in CONSTANTS:
                push(CONSTANTS[name])
            case 'EMPTY_LIST' | 'LIST':
                push(items)
            case 'TUPLE' | 'TUPLE1' | 'TUPLE2' | 'TUPLE3':
                push(tuple(items))
            case 'EMPTY_DICT' | 'DICT':
                push({})
                self.set_items(items)
            case 'APPEND' | 'APPENDS':
                if type(self.stack[-1]) is list:
                    self.stack[-1].extend(items)
            case 'SETITEM' | 'SETITEMS':
                self.set_items(items)
            case 'MARK':
                self.marks.append(self.stack)
                self.stack = []
            case 'POP':
                self.stack.pop()
            case 'PUT' | 'BINPUT' | 'LONG_BINPUT':
                if not 0 <= arg < MAX_OPCODES:  # the hashes of others could collide
                    raise ValueError('a memo index that no writer uses')
                self.memo[arg] = self.stack[-1]
            case 'MEMOIZE':
                self.memo[len(self.memo)] = self.stack[-1]
            case 'GET' | 'BINGET' | 'LONG_BINGET':
                push(self.memo[arg])
            case 'GLOBAL' | 'STACK_GLOBAL':
                push(self.look_up(*(items or arg.split(' '))))
            case 'BINPERSID':
                push(self.storage(*items))
            case 'REDUCE':
                function, args = items
                push(function(*args) if callable(function) else Inert())
            case 'BUILD':
                self.build(self.stack[-1], *items)
            case 'NEWOBJ':
                push(Inert())
            case 'PROTO' | 'FRAME' | 'STOP':
                pass
            case _:
                raise ValueError(f'opcode {name}')

    def set_items(self, items):
        """Only short strings become keys: hashed once, and nobody can make them collide."""
        target = self.stack[-1]
        if isinstance(target, dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                if type(key) is str and len(key) <= MAX_KEY:
                    target[key] = value

    def look_up(self, module, name):
        if type(module) is not str or type(name) is not str:
            raise ValueError('a name that is not a string')
        return self.known.get((module.partition('.')[0], name), Inert())

    def build(self, target, state):
        """Two things are filled in after they were made: numpy's dtypes and arrays."""
        if type(target) is SimpleNamespace:
            target.order = state[1]
        elif type(target) is np.ndarray:
            _, shape, dtype, fortran, data = state
            array = self.array(data, dtype, shape)
            if type(array) is np.ndarray:
                target.__setstate__((1, shape, array.dtype, bool(fortran), array.tobytes()))

    # what stands for the functions that a file may name

    def spend(self, size):
        self.room -= size
        if self.room < 0:
            raise ValueError('it asks for more memory than its size explains')

    def array(self, data, dtype, shape, order='C'):
        if type(dtype) is not SimpleNamespace or type(data) not in (str, bytes, bytearray):
            return Inert()  # protocol 2 calls a function for no bytes
        code = dtype.order + dtype.code
        if not re.fullmatch('[<>=|](b1|[iu][1248]|f[248])', code):
            return Inert()  # no numbers; objects above all do not exist here
        self.spend(len(data))
        if type(data) is str:  # of protocol 2, or written by Python 2
            data = data.encode('latin1')
        array = np.frombuffer(data, code)
        if count(shape) != len(array):
            raise ValueError(f'an array of {count(shape)} {code} in {len(data)} bytes')
        return array.reshape(shape, order=order)

    def scalar(self, dtype, data):
        array = self.array(data, dtype, (1,))
        return array[0] if type(array) is np.ndarray else array

    def tensor(self, storage, offset, size, stride, *_):
        if type(storage) is not torch.Tensor or count(size) > len(storage):
            return Inert()  # one with more numbers than its storage was expanded, and is no weight
        return storage.as_strided(size, stride, offset)  # which stays inside, or raises

    def storage(self, pid):
        """The 1-D tensor of pid, ('storage', dtype, key, device, length)."""
        _, dtype, key, *_ = pid
        if type(dtype) is not torch.dtype:
            return Inert()
        name = self.index.removesuffix('.pkl') + '/' + key
        if name not in self.storages:
            self.storages[name] = bytearray(self.unzip(name))
        if not self.storages[name]:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self.storages[name], dtype=dtype)

    def unzip(self, name):
        """The bytes of an entry; zipfile compares them with its checksum."""
        entry = self.archive.getinfo(name)
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f'{name} is compressed, which torch.save never does')
        self.spend(entry.file_size)
        return self.archive.read(name)


def count(shape):
    """How many numbers there are in an array of this shape; torch takes some negative ones."""
    if type(shape) is not tuple or len(shape) > 32:
        raise ValueError('a shape that is no tuple of a few numbers')
    if any(type(n) is not int or not 0 <= n < 2 ** 48 for n in shape):
        raise ValueError('a shape that is not of whole numbers')
    return math.prod(shape)


def one_line(error):
    return ' '.join(f'{type(error).__name__}: {error}'.split())[:200]


@contextlib.contextmanager
def refusing(path, kind):
    """Whatever goes wrong inside becomes one line: a broken or hostile file can raise anything."""
    try:
        if not os.path.isfile(path):
            raise ValueError('it is missing, a folder, a pipe or a device')
        yield
    except Exception as e:
        raise UserError(f'{path} is not a readable {kind} file ({one_line(e)}); '
                        'restore it or use another one') from e


def read_torch(path):
    """What torch.save or pickle wrote, all of it in memory. Raises UserError.

    All but dicts, lists, tensors, arrays, numbers and strings is Inert, and keys of dicts that are
    no strings are left out.
    """
    with refusing(path, 'PyTorch (1.6 or newer) or pickle'):
        return Machine(path).read()


def load_array(path):
    """The array, tensor or list of numbers in a .pkl or .pth, as an array. Raises UserError."""
    tree = read_torch(path)
    with refusing(path, 'array'):
        if type(tree) is torch.Tensor:
            return tree.numpy()
        if type(tree) in (list, tuple):
            if all(isinstance(n, (int, float, np.number)) for n in tree):
                tree = np.array(tree)
        if type(tree) is not np.ndarray or tree.dtype == object or not tree.size:
            raise ValueError('it holds something else than an array, a tensor or a list of numbers')
        return tree.astype(tree.dtype.newbyteorder('='), copy=False)  # torch knows no other order
