"""The machine: which process am I, on what device, in which precision, and how fast is it?"""
import contextlib
import functools
import os
import platform
import re
import signal
import time

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from configurator import UserError, check_choice

# who am I among the processes that torchrun started? One process alone is rank 0 of 1
RANK = int(os.environ.get('RANK', 0))
LOCAL_RANK = int(os.environ.get('LOCAL_RANK', 0))
WORLD_SIZE = int(os.environ.get('WORLD_SIZE', 1))
RESTARTS = int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0))
# torchrun makes a folder for the errors of each launch, on each node, .../attempt_0/3/error.json:
# its name tells launches apart, as the run's id does not, which is the same for the same command
LAUNCH = os.environ.get('TORCHELASTIC_ERROR_FILE', '').rpartition('/attempt_')[0]

DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}


def under_results(path):
    """Where a relative path of data/ or out/ lies: $RESULTS_DIR moves both to another disk."""
    return os.path.normpath(os.path.join(os.environ.get('RESULTS_DIR', ''), path))


def write_whole(path, content):
    """Write text or bytes to a file; a kill leaves the old one or the new. Raises UserError."""
    if isinstance(content, str):
        content = content.encode()
    try:
        with open(f'{path}.tmp', 'wb') as f:
            f.write(content)
        os.replace(f'{path}.tmp', path)
    except OSError as e:  # a full disk does not say of which file
        raise UserError(f'cannot write {path}: {e.strerror}') from e


def pick_device(name=''):
    """The device of that name, or the best there is; under torchrun each process has its own GPU."""
    best = torch.accelerator.current_accelerator(check_available=True) or 'cpu'
    name = name or str(best)
    try:
        if name == 'cuda':
            torch.cuda.set_device(LOCAL_RANK)
        return str(torch.empty(0, device=name).device)
    except (RuntimeError, AssertionError, AttributeError) as e:
        raise UserError(f'device={name!r} is not available here; try --device={best}') from e


def pick_dtype(name, device):
    """The name of the dtype to compute in: '' is bf16 on CUDA, else fp32."""
    if not name:
        return 'bf16' if device.startswith('cuda') else 'fp32'
    check_choice('dtype', name, DTYPES)
    if name == 'fp16' and device == 'cpu':
        raise UserError('dtype=fp16 is for GPUs; on a CPU use --dtype=bf16, or fp32')
    return name


def fast_dtype():
    """bf16 where the hardware has instructions for it, else fp32."""
    capabilities = getattr(torch.cpu, 'get_capabilities', dict)()
    has_bf16 = torch.cuda.is_available() or capabilities.get('avx512_bf16')
    return 'bf16' if has_bf16 else 'fp32'


def autocast(device, dtype):
    """The context to compute in: matrix products in `dtype`, weights in fp32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    # no cache of cast weights: each is used once a pass, and under FSDP, which holds a part of the
    # model, the copies would add up to all of it
    return torch.autocast(torch.device(device).type, DTYPES[dtype], enabled=dtype != 'fp32',
                          cache_enabled=False)


def cast_weights(model, dtype):
    """Cast the weights of products once, for the same numbers as autocast, which does it at every call.

    For a model that only dreams, under `autocast`. A frame of PushT in bf16 on a CPU: 39 -> 25 ms.
    """
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            module.to(DTYPES[dtype])


class Interrupt:
    """SIGTERM and Ctrl-C do not end a training at once: it finishes the step, saves, and leaves.

    Several processes have to leave after the same step, and torchrun kills those that have not left
    30 seconds after its SIGTERM. Asking at every step would make each wait for the device, so they
    do it about every PATIENCE seconds, and then agree on the step at which they ask again.
    """
    PATIENCE = 5

    def __init__(self, step):
        self.signal = 0
        self.asked_at, self.ask_at, self.clock = step, step + 1, time.perf_counter()
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self.on_signal)

    def on_signal(self, signum, frame):
        self.signal = signum

    def agreed(self, step, device):
        """Whether all processes leave after this step; each has to ask after every step."""
        if WORLD_SIZE == 1:
            return self.signal > 0
        if step < self.ask_at:
            return False
        synchronize(device)
        now = time.perf_counter()
        took = (now - self.clock) / (step - self.asked_at)
        numbers = torch.tensor([float(self.signal > 0), took], device=device)
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        signals, took = numbers.tolist()
        self.asked_at, self.clock = step, now
        self.ask_at = step + max(1, int(self.PATIENCE / took))
        return signals > 0

    @property
    def exit_code(self):
        """The shell's for the signal; on processes that did not get it themselves, SIGTERM's."""
        return 128 + (self.signal or signal.SIGTERM)


# -----------------------------------------------------------------------------
# several processes

def join_processes(device='cpu', **options):
    """Meet the other processes that torchrun started, if there are any."""
    if WORLD_SIZE > 1:
        dist.init_process_group('nccl' if device.startswith('cuda') else 'gloo', **options)


def leave_processes():
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier():
    if dist.is_initialized():
        dist.barrier()


def mean(numbers):
    """The mean over all processes of a tensor of numbers."""
    if WORLD_SIZE > 1:
        dist.all_reduce(numbers)
    return numbers / WORLD_SIZE


def gather(x):
    """[what each process has], of anything that pickles."""
    everyone = [x] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(everyone, x)
    return everyone


def recompute_activations(model):
    """Compute every block again in the backward pass, instead of keeping its activations."""
    for block in model.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def shard(model, device):
    """FSDP: every process keeps a part of each block's weights, gradients and moments."""
    mesh = init_device_mesh(torch.device(device).type, (WORLD_SIZE,))
    # the root is cut again after a forward pass, too: an EMA has no backward pass to do it
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    for block in model.blocks:
        register_fsdp_forward_method(block, 'remember')


def compiled(model, device, wanted):
    """torch.compile if wanted, without AVX-512 on a CPU: there torch 2.13 turns bf16 gradients of 64
    patches a frame to NaN."""
    if not wanted:
        return model
    if device == 'cpu':
        torch._inductor.config.cpp.simdlen = 256
    return torch.compile(model)


def uncompiled(net):
    """The model in what torch.compile has wrapped around it."""
    return getattr(net, '_orig_mod', net)


def distributed(net, device):
    """DDP: every process has all weights, and they average their gradients."""
    if WORLD_SIZE == 1 or isinstance(uncompiled(net), FSDPModule):
        return net
    ids = [torch.cuda.current_device()] if device.startswith('cuda') else None
    return DistributedDataParallel(net, device_ids=ids, broadcast_buffers=False)


def gradient_sync(net, wanted):
    """A context for a backward pass; only if wanted do processes exchange gradients in it."""
    if isinstance(uncompiled(net), FSDPModule):
        uncompiled(net).set_requires_gradient_sync(wanted)
    elif isinstance(net, DistributedDataParallel) and not wanted:
        return net.no_sync()
    return contextlib.nullcontext()


def whole(x):
    """A tensor that FSDP may have cut among the processes, put together."""
    return x.full_tensor() if isinstance(x, DTensor) else x


# -----------------------------------------------------------------------------
# speed

def synchronize(device):
    """Wait until the device has done what it was given."""
    if torch.device(device).type != 'cpu':
        torch.accelerator.synchronize()


def seconds(f, device):
    """How long f() takes, until the device has done it."""
    synchronize(device)
    start = time.perf_counter()
    f()
    synchronize(device)
    return time.perf_counter() - start


def matmul_rate(device, dtype='fp32', repeats=6):
    """FLOP/s of a large matrix product, the yardstick for all that are: the best of `repeats`."""
    n = 2048 if device == 'cpu' else 8192
    a = torch.randn(n, n, device=device, dtype=DTYPES[dtype])
    return 2 * n ** 3 / min(seconds(lambda: a @ a, device) for _ in range(repeats))


def name_of(device):
    """What computes, in words."""
    if device.startswith('cuda'):
        return torch.cuda.get_device_name(device)
    name = [platform.machine()]
    with contextlib.suppress(OSError), open('/proc/cpuinfo') as f:
        name = re.findall(r'model name\s*: (.*)', f.read()) or name  # not on every kind of CPU
    return f'{name[0]}, threads: {torch.get_num_threads()}'
