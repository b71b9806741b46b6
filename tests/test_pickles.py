"""Truths about strangers' pickles: what numpy and torch wrote comes back, and a hostile file gets one line."""
import copy
import os
import pickle
import resource
import struct
import sys
import zipfile

import numpy as np
import pytest
import torch

from configurator import UserError
from pickles import load_array, read_torch

ARRAYS = {
    'matrix': np.arange(12.0).reshape(3, 4),
    'transposed': np.arange(12, dtype=np.int16).reshape(3, 4).T,
    'big-endian': np.arange(5, dtype='>i4'),
    'flags': np.array([[True, False]]),
    'half': np.float16([[1, 2]]),
    'bytes': np.arange(256, dtype=np.uint8),  # which are not ASCII
    'numbers': [3, np.int64(4), np.float32(2.5), True],
}


def write(path, data):
    with open(path, 'wb') as f:
        f.write(data)
    return str(path)


@pytest.mark.parametrize('protocol', range(6))
@pytest.mark.parametrize('name', ARRAYS)
def test_arrays_of_every_protocol_come_back(name, protocol, tmp_path):
    want = np.asarray(ARRAYS[name])
    loaded = load_array(write(tmp_path / 'a.pkl', pickle.dumps(ARRAYS[name], protocol)))
    assert loaded.dtype == want.dtype.newbyteorder('=') and np.array_equal(loaded, want)


@pytest.mark.parametrize('home', [b'numpy.core', b'numpy._core'])
def test_arrays_of_numpy_1_and_2_come_back(home, tmp_path):
    array = ARRAYS['matrix']
    data = pickle.dumps(array, protocol=2).replace(b'numpy._core', home).replace(b'numpy.core', home)
    assert home + b'.multiarray' in data
    assert (load_array(write(tmp_path / 'a.pkl', data)) == array).all()


@pytest.mark.parametrize('saved', [
    torch.randn(3, 4), torch.randn(3, 4).T, torch.randn(9)[2:5], torch.arange(9).byte(), torch.tensor(2.0),
    torch.nn.Parameter(torch.ones(2)), np.arange(5.0)])
def test_tensors_and_arrays_of_torch_come_back(saved, tmp_path):
    torch.save(saved, tmp_path / 'a.pth')
    want = saved.detach().numpy() if isinstance(saved, torch.Tensor) else saved
    loaded = load_array(str(tmp_path / 'a.pth'))
    assert loaded.dtype == want.dtype and np.array_equal(loaded, want)


def test_what_is_not_known_is_inert(tmp_path):
    saved = {'weight': torch.ones(2), 'net': torch.nn.Linear(2, 2), 'words': np.array(['a']), 'path': tmp_path,
             'expanded': torch.ones(1).expand(9), 'complex': torch.ones(1, dtype=torch.complex64),
             'optimizer': {0: {'step': 1}}, 'empty': np.zeros((0, 3))}
    torch.save(saved, tmp_path / 'a.ckpt')
    tree = read_torch(str(tmp_path / 'a.ckpt'))
    assert tree.keys() == saved.keys() and tree['weight'].tolist() == [1, 1]
    assert tree['expanded'] == tree['complex'] == tree['path'] == tree['optimizer'] == {}


# -----------------------------------------------------------------------------
# hostile files, written by hand: opcodes of the pickle machine

def text(s):
    return b'X' + struct.pack('<I', len(s)) + s.encode()


def number(n):
    data = n.to_bytes(n.bit_length() // 8 + 1, 'little', signed=True)
    return b'\x8b' + struct.pack('<i', len(data)) + data


def call(name, *args):
    return b'c' + name.encode() + b'\n(' + b''.join(args) + b'tR'


def numbers(*shape):
    return b'(' + b''.join(number(n) for n in shape) + b't'


def dtype(code):
    return call('numpy\ndtype', text(code), b'\x89\x88')


def frombuffer(code, data, *shape):
    raw = b'C' + bytes([len(data)]) + data
    return call('numpy._core.numeric\n_frombuffer', raw, dtype(code), numbers(*shape), text('C'))


def reconstruct(code, data, *shape):
    raw = b'C' + bytes([len(data)]) + data
    empty = call('numpy.core.multiarray\n_reconstruct', b'cnumpy\nndarray\n', numbers(0), text('b'))
    return empty + b'(' + number(1) + numbers(*shape) + dtype(code) + b'\x89' + raw + b'tb'


PICKLES = {
    'ndarray of bytes as pointers': call('numpy\nndarray', numbers(1), text('O8'), b'C\x08AAAAAAAA'),
    'objects from a buffer': frombuffer('O8', b'A' * 8, 1),
    'objects filled in': reconstruct('O8', b'A' * 8, 1),
    'objects as a scalar': call('numpy.core.multiarray\nscalar', dtype('O8'), b'C\x08AAAAAAAA'),
    'a structured dtype': frombuffer('O8,O8', b'A' * 16, 1),
    'a shape beyond the bytes': frombuffer('f4', b'A' * 8, 2 ** 40),
    'a shape beyond the bytes, filled in': reconstruct('f4', b'A' * 8, 2 ** 30, 2 ** 30),
    'a negative shape': frombuffer('f4', b'A' * 8, -1, -2),
    'a shape of many numbers': frombuffer('f4', b'A' * 8, *[2 ** 2000] * 2000),
    'an empty shape of 2**62': reconstruct('f4', b'', 0, 2 ** 62),
    'one array ten thousand times': b'(' + text('x' * 2 ** 20) + b'q\x00' + call(
        '_codecs\nencode', b'h\x00', text('latin1')) * 10_000 + b'l',
    'a system call': call('os\nsystem', text('touch ran')),
    'a system call by an instance': b'(' + text('touch ran') + b'ios\nsystem\n',
    'a system call by another name': b'cbuiltins\neval\n(' + text('open("ran", "w")') + b'tR',
    'memo index 2**31': b']r' + struct.pack('<I', 2 ** 31),
    'memo indices whose hashes collide': b''.join(b'I1\np%d\n' % (i * (2 ** 61 - 1)) for i in range(1, 60_000)),
    'memo index of thousands of digits': b']p' + b'9' * 4000 + b'\n',
    'a number of a million digits': b'L' + b'9' * 1_000_000 + b'L\n',
    'a float beyond floats': b'(' + number(2 ** 9999) + b'G' + bytes(8) + b'l',
    'a number of 64 bits and more': b'(' + number(2 ** 70) + b'l',
    'a deep key': b'}' + b')' + b'\x85' * 200_000 + b'Ns',
    'a key that doubles': b'})' + b'2\x86' * 60 + b'Ns',
    'huge numbers as keys': b'}(' + number(2 ** 800_000) + b'q\x00N' + b'h\x00N' * 100_000 + b'u',
    'deep lists': b']' * 200_000 + b'a' * 199_999,
    'deep sets': b'\x8f(' * 50_000 + b'\x90' * 50_000,
    'lists that double': b']' + b'2\x86' * 60,
    'a name that doubles': b')' + b'2\x86' * 60 + b'2\x93',
    'a text of 2**40 bytes': b'\x8d' + struct.pack('<Q', 2 ** 40),
    'an array of 2**40 bytes': b'\x96' + struct.pack('<Q', 2 ** 40),
    'bytes of -1': b'T' + struct.pack('<i', -1),
    'a frame of 2**60': b'\x95' + struct.pack('<Q', 2 ** 60) + b'N',
    'millions of opcodes': b'N0' * 1_100_000 + b'N',
    'nothing on the stack': b'0000',
    'no mark': b'Nt',
    'a buffer from elsewhere': b'\x97',
    'an extension': b'\x82\x01',
    'a persistent name': b'Pabc\n',
    'a persistent number': b'K\x01Q',
    'an opcode that is none': b'\xff',
    'itself': b']2a',
    'nothing': b'',
    'zeros': bytes(1000),
    'an old torch.save': pickle.dumps(0x1950a86a20f9469cfc6c, 2)[:-1] + b'.' + pickle.dumps(1001, 2),
}


def peak():
    """The most memory that this process ever had, in GiB."""
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30


def refused(f, path):
    before = peak()
    with pytest.raises(UserError) as e:
        f(path)
    assert path in str(e.value) and '\n' not in str(e.value) and len(str(e.value)) < 1000
    assert peak() - before < 0.5 and not os.path.exists('ran')


@pytest.mark.parametrize('name', PICKLES)
def test_a_hostile_pickle_gets_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(load_array, write(tmp_path / 'a.pkl', PICKLES[name] + b'.'))


def tensor(*shape, strides=None, offset=0, key='0', kind='FloatStorage'):
    storage = b'(' + text('storage') + f'ctorch\n{kind}\n'.encode() + text(key) + text('cpu') + number(4) + b'tQ'
    strides = strides if strides else [1] * len(shape)
    return call('torch._utils\n_rebuild_tensor_v2', storage, number(offset), numbers(*shape), numbers(*strides),
                b'\x89})R')


TENSORS = {
    'more numbers than bytes': tensor(5),
    'strides of 0 for gigabytes': tensor(40000, 40000, strides=[0, 0]),
    'strides that leave the storage': tensor(2, strides=[2 ** 40]),
    'negative strides': tensor(2, strides=[-1]),
    'a negative offset': tensor(1, offset=-1),
    'an offset behind the end': tensor(1, offset=4),
    'strides of another length': tensor(2, strides=[1, 1]),
    'a negative size': tensor(-1),
    'a size of 2**62': tensor(0, 2 ** 62),
    'a storage that is not there': tensor(1, key='1'),
    'a storage elsewhere': tensor(1, key='../../secret'),
    'a storage of objects': tensor(1, kind='ObjectStorage'),
    'numbers of another width': tensor(4, kind='DoubleStorage'),
    'no storage': call('torch._utils\n_rebuild_tensor_v2', b'N', number(0), numbers(1), numbers(1)),
    'a system call': call('os\nsystem', text('touch ran')),
    'a name of a name': call('builtins\ngetattr', b'cos\nsystem\n', text('run')) + b'(' + text('touch ran') + b'tR',
}


def archive(path, program, compression=zipfile.ZIP_STORED, storage=bytes(16)):
    with zipfile.ZipFile(path, 'w') as f:
        f.writestr('a/data.pkl', program + b'.')
        f.writestr('a/data/0', storage, compression)
    return str(path)


def test_a_tensor_written_by_hand_is_read(tmp_path):
    assert load_array(archive(tmp_path / 'a.pth', tensor(2, 2, strides=[2, 1]))).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize('name', TENSORS)
def test_a_hostile_tensor_gets_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(load_array, archive(tmp_path / 'a.pth', TENSORS[name]))


def compressed_storage(path):
    archive(path, tensor(2 ** 24), zipfile.ZIP_DEFLATED, bytes(2 ** 26))


def compressed_index(path):
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as f:
        f.writestr('a/data.pkl', b'}' * 2 ** 24 + b'.')


def no_index(path):
    with zipfile.ZipFile(path, 'w') as f:
        f.writestr('a/other.pkl', b'N.')


def claimed_size(path):
    """An archive whose directory says that the storage has 4 GiB."""
    archive(path, tensor(2 ** 28))
    data = path.read_bytes()
    at = data.rindex(b'PK\x01\x02')
    write(path, data[:at + 20] + struct.pack('<II', 2 ** 32 - 2, 2 ** 32 - 2) + data[at + 28:])


def cut(path):
    torch.save({'weight': torch.randn(1000)}, path)
    write(path, path.read_bytes()[:3000])


def flipped(path):
    """One bit of a weight is not what it was when the file was written."""
    torch.save({'weight': torch.full((1000,), 2.5)}, path)
    data = path.read_bytes()
    at = data.index(struct.pack('<f', 2.5) * 1000)
    write(path, data[:at] + bytes([data[at] ^ 1]) + data[at + 1:])


def overlapping(path):
    """A directory that lists the same 4 MiB a thousand times."""
    with zipfile.ZipFile(path, 'w') as f:
        f.writestr('a/data/0', bytes(2 ** 22))
        entry = f.getinfo('a/data/0')
        program = b'(' + b''.join(tensor(1, key=str(i)) for i in range(1000)) + b'l.'
        f.writestr('a/data.pkl', program)
        for i in range(1, 1000):
            other = copy.copy(entry)
            other.filename = f'a/data/{i}'
            f.filelist.append(other)


def cut_pickle(path):
    data = pickle.dumps(np.arange(1000.0))
    write(path, data[:len(data) // 2])


@pytest.mark.parametrize('make', [compressed_storage, compressed_index, no_index, claimed_size, cut, flipped,
                                  overlapping, cut_pickle,
                                  os.mkfifo, os.mkdir])
def test_a_broken_archive_gets_one_line(make, tmp_path):
    make(tmp_path / 'a.pth')
    refused(load_array, str(tmp_path / 'a.pth'))
    refused(read_torch, str(tmp_path / 'a.pth'))
