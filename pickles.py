"""Pickles of strangers: the arrays and tensors in a .pkl, or in whatever torch.save wrote.

A pickle is a program for a small stack machine, and Python's own reader imports and calls whatever
the program names. This machine does not: a class or function that a file names stays a name, and
what it would have made is `Inert`. The few that make arrays and tensors are replaced by ours, which
compare what the file claims (shape, strides, dtype) with the bytes it really holds: no file can ask
for more memory than its size explains.

    tree = read_torch('epoch=3.ckpt')    # of dicts, lists, tensors, numbers, strings and Inert
    lengths = load_array('seq_lengths.pkl')
"""
import contextlib
import math
import mmap
import os
import pickletools
import re
import struct
import zipfile
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import torch

from configurator import UserError

MAX_OPCODES = 2_000_000  # a large checkpoint has 100,000; each may take about 100 bytes
MAX_KEY = 1000  # characters of a key in a dict; the name of a parameter has fewer

# opcodes whose argument is the value itself, and those that mean one value
VALUES = set('INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING '
             'SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES '
             'SHORT_BINBYTES BINBYTES8 BYTEARRAY8'.split())
CONSTANTS = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False, 'EMPTY_TUPLE': ()}
# opcodes that take so many objects from the stack, and those that take all above the last mark
TAKE = {'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3, 'APPEND': 1, 'SETITEM': 2, 'BUILD': 1,
        'REDUCE': 2, 'NEWOBJ': 2, 'NEWOBJ_EX': 3, 'STACK_GLOBAL': 2, 'BINPERSID': 1}
TAKE_TO_MARK = {'TUPLE', 'LIST', 'DICT', 'FROZENSET', 'APPENDS', 'SETITEMS', 'ADDITEMS',
                'POP_MARK', 'INST', 'OBJ'}

STORAGES = {'DoubleStorage': torch.float64, 'FloatStorage': torch.float32,
            'HalfStorage': torch.float16, 'BFloat16Storage': torch.bfloat16,
            'LongStorage': torch.int64, 'IntStorage': torch.int32, 'ShortStorage': torch.int16,
            'CharStorage': torch.int8, 'ByteStorage': torch.uint8, 'BoolStorage': torch.bool}

Global = namedtuple('Global', 'module name')  # a class or function, by name only


class Inert(dict):
    """What an unknown class or function would have made; like an OrderedDict, it keeps items."""
    __slots__ = ()


class Machine:
    """Runs the pickle `data`; load_storage(id) gives the 1-D tensor that torch.save stored beside it.
    """

    def __init__(self, data, load_storage=None):
        self.data, self.load_storage = data, load_storage
        self.stack, self.marks = [], []
        self.memo = {}  # a dict: to put something at place 2**31 takes no room
        # bytes that strings and arrays may take: an honest file holds every number once
        self.room = 3 * len(data)
        self.builders = {
            ('_codecs', 'encode'): self.encode,
            ('numpy', 'dtype'): self.dtype,
            ('numpy', '_reconstruct'): self.unfilled_array,
            ('numpy', '_frombuffer'): self.array,
            ('numpy', 'scalar'): self.scalar,
            ('torch', '_rebuild_tensor_v2'): self.tensor,
            ('torch', '_rebuild_parameter'): self.parameter,
            ('torch', '_rebuild_parameter_with_state'): self.parameter,
        }

    def run(self):
        for count, (opcode, arg, _) in enumerate(pickletools.genops(self.data)):
            if count == MAX_OPCODES:
                raise ValueError(f'more than {MAX_OPCODES:,} opcodes')
            self.step(opcode.name, arg, self.take(opcode.name))
        return self.stack.pop()

    def take(self, name):
        """The objects that an opcode works on, taken from the stack."""
        items = []
        if name in TAKE:
            items = self.stack[-TAKE[name]:]
            del self.stack[-TAKE[name]:]
        elif name in TAKE_TO_MARK:
            items, self.stack = self.stack, self.marks.pop()
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
            case 'DUP':
                push(self.stack[-1])
            case 'PUT' | 'BINPUT' | 'LONG_BINPUT':
                if not 0 <= arg < MAX_OPCODES:  # others could be chosen so that their hashes collide
                    raise ValueError('a memo index that no writer uses')
                self.memo[arg] = self.stack[-1]
            case 'MEMOIZE':
                self.memo[len(self.memo)] = self.stack[-1]
            case 'GET' | 'BINGET' | 'LONG_BINGET':
                push(self.memo[arg])
            case 'GLOBAL' | 'STACK_GLOBAL':
                push(self.name(*(items or arg.split(' '))))
            case 'BINPERSID':
                push(self.load_storage(*items))
            case 'REDUCE':
                push(self.call(*items))
            case 'BUILD':
                self.build(self.stack[-1], *items)
            case 'EMPTY_SET' | 'FROZENSET' | 'INST' | 'OBJ' | 'NEWOBJ' | 'NEWOBJ_EX':
                push(Inert())
            case 'PROTO' | 'FRAME' | 'STOP' | 'POP_MARK' | 'ADDITEMS':
                pass
            case _:
                raise ValueError(f'opcode {name}')

    def set_items(self, items):
        """Only short strings become keys: they are hashed once, and nobody can make them collide."""
        target = self.stack[-1]
        if isinstance(target, dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                if type(key) is str and len(key) <= MAX_KEY:
                    target[key] = value

    def name(self, module, name):
        if type(module) is not str or type(name) is not str:
            raise ValueError('a name that is not a string')
        return Global(module, name)

    def call(self, function, args):
        builder = None
        if type(function) is Global:
            builder = self.builders.get((function.module.split('.')[0], function.name))
        if not builder:
            return Inert()
        if type(args) is not tuple:
            raise ValueError(f'the arguments of {function.name} are no tuple')
        return builder(*args)

    def build(self, target, state):
        """Two things are filled in after they were made: numpy's dtypes and arrays."""
        if type(target) is SimpleNamespace:
            target.order = state[1]
        elif type(target) is np.ndarray:
            _, shape, dtype, fortran, data = state
            if type(data) is str:  # written by Python 2
                data = self.encode(data)
            array = self.array(data, dtype, shape)
            if type(array) is np.ndarray:
                target.__setstate__((1, shape, array.dtype, bool(fortran), bytes(data)))

    # what stands for the functions that a file may name

    def spend(self, size):
        self.room -= size
        if self.room < 0:
            raise ValueError('it asks for more memory than its size explains')

    def encode(self, text, encoding='latin1'):
        """How protocol 2 writes bytes."""
        self.spend(len(text))
        return text.encode('latin1')

    def dtype(self, code, *_):
        """A number's dtype, as (code, order); others, objects above all, do not exist here."""
        if type(code) is str and re.fullmatch('b1|[iu][1248]|f[248]', code):
            return SimpleNamespace(code=code, order='=')
        return Inert()

    def unfilled_array(self, *_):
        return np.empty(0, np.uint8)

    def array(self, data, dtype, shape, order='C'):
        if type(dtype) is not SimpleNamespace or type(data) not in (bytes, bytearray):
            return Inert()
        if dtype.order not in ('<', '>', '=', '|'):
            raise ValueError(f'byte order {dtype.order!r}')
        dtype = np.dtype(dtype.order + dtype.code)
        if count(shape) * dtype.itemsize != len(data):
            raise ValueError(f'an array of {count(shape)} {dtype} in {len(data)} bytes')
        self.spend(len(data))
        return np.frombuffer(data, dtype).reshape(shape, order=order)

    def scalar(self, dtype, data):
        array = self.array(data, dtype, (1,))
        return array[0] if type(array) is np.ndarray else array

    def tensor(self, storage, offset, size, stride, *_):
        if type(storage) is not torch.Tensor or count(size) > len(storage):
            return Inert()  # one with more numbers than its storage was expanded, and is no weight
        last = offset
        for n, step in zip(size, whole_numbers(stride), strict=True):
            last += (n - 1) * step
        if count(size) and last >= len(storage):
            raise ValueError(f'a tensor that ends at {last + 1} of a storage of {len(storage)}')
        return storage.as_strided(size, stride, offset)

    def parameter(self, tensor, *_):
        return tensor


def whole_numbers(shape):
    if type(shape) is not tuple or len(shape) > 32:
        raise ValueError('a shape that is no tuple of a few numbers')
    if any(type(n) is not int or not 0 <= n < 2 ** 48 for n in shape):
        raise ValueError('a shape that is not of whole numbers')
    return shape


def count(shape):
    """How many numbers there are in an array of this shape."""
    return math.prod(whole_numbers(shape))


class Archive:
    """The zip file that torch.save writes: data.pkl, and beside it the bytes of each storage.

    They are mapped into memory and not read: a tensor that nobody looks at (an optimizer's, say)
    costs nothing.
    """

    def __init__(self, path):
        with open(path, 'rb') as f:
            # a copy where somebody writes, as torch wants its memory writable
            self.bytes = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
        with zipfile.ZipFile(path) as f:
            self.entries = {entry.filename: entry for entry in f.infolist()}
        indices = [name for name in self.entries if name.endswith('/data.pkl')]
        if not indices:
            raise ValueError('no data.pkl in it; torch.save of PyTorch 1.6 or newer writes one')
        self.index = indices[0]

    def read(self):
        start, size = self.place(self.index)
        return Machine(self.bytes[start:start + size], self.load_storage).run()

    def place(self, name):
        """(start, size) of an entry in the file."""
        entry = self.entries[name]
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f'{name} is compressed, which torch.save never does')
        header = self.bytes[entry.header_offset:entry.header_offset + 30]
        name_length, extra_length = struct.unpack('<HH', header[26:])
        start = entry.header_offset + 30 + name_length + extra_length
        if start + entry.file_size > len(self.bytes):
            raise ValueError(f'{name} ends after the file')
        return start, entry.file_size

    def load_storage(self, pid):
        """pid: ('storage', class, key, device, length)."""
        _, kind, key, *_ = pid
        if type(kind) is not Global or type(key) is not str:
            raise ValueError('a storage without a name')
        if kind.name not in STORAGES:
            return Inert()
        dtype = STORAGES[kind.name]
        start, size = self.place(self.index.removesuffix('.pkl') + '/' + key)
        if size < dtype.itemsize:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self.bytes, dtype=dtype, count=size // dtype.itemsize, offset=start)


@contextlib.contextmanager
def refusing(path):
    """Whatever goes wrong inside becomes one line: a broken or hostile file can raise anything."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError('it is a folder, a pipe or a device')
        yield
    except Exception as e:
        why = ' '.join(f'{type(e).__name__}: {e}'.split())[:200]
        raise UserError(f'{path} is not a readable PyTorch (1.6 or newer) or pickle file ({why}); '
                        'restore it or use another one') from e


def read_torch(path):
    """What torch.save wrote; all but dicts, lists, tensors, arrays, numbers and strings is Inert.

    Keys of dicts that are no strings are left out. Tensors share memory with the file. Raises UserError.
    """
    with refusing(path):
        return Archive(path).read()


def load_array(path):
    """The array, tensor or list of numbers in a .pkl or .pth, as an array. Raises UserError."""
    with refusing(path):
        if zipfile.is_zipfile(path):
            tree = Archive(path).read()
        else:
            with open(path, 'rb') as f:
                tree = Machine(f.read()).run()
        if type(tree) is torch.Tensor:
            return tree.numpy()
        if type(tree) in (list, tuple):
            if all(isinstance(n, (int, float, np.number)) for n in tree):
                tree = np.array(tree)
        if type(tree) is not np.ndarray or tree.dtype == object or not tree.size:
            raise ValueError('it holds something else than an array, a tensor or a list of numbers')
        return tree.astype(tree.dtype.newbyteorder('='), copy=False)  # torch knows no other order
