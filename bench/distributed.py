"""What it costs to compare the gradients of several processes: time and bytes of a batch, as multiples of a training without.

    torchrun --nproc-per-node 2 bench/distributed.py --data DATA

Each arm trains for some batches, one arm after the other, again and again; the ratio is the median over the rounds. The hook is
DistributedDataParallel's own communication hook, with the norm of each bucket before and after it is averaged (as others do it).
Bytes are those that gloo was asked to exchange, from PyTorch's profiler, in one process and a batch."""
import os
os.environ.setdefault('ACCELERATE_USE_CPU', 'true')

from common import *
import torch.distributed as dist
from fastai.distributed import *
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

class CommHook(Callback):
    "The norm of each bucket of gradients, before it is averaged and after"
    order = 12
    def before_fit(self):
        self.norms = []
        self.learn.model.register_comm_hook(None, self.hook)
    def hook(self, state, bucket):
        self.norms.append(bucket.buffer().norm())
        fut = default_hooks.allreduce_hook(dist.group.WORLD, bucket)
        def after(fut):
            self.norms.append(fut.value()[0].norm())
            return fut.value()[0]
        return fut.then(after)

class Batches(Callback):
    "End a fit after `n` batches, and time those after the first five"
    order,run_valid = 100,False
    def __init__(self, n): self.n,self.i = n,0
    def after_batch(self):
        self.i += 1
        if self.i==5: self.start = time.perf_counter()
        if self.i==self.n:
            self.seconds = (time.perf_counter()-self.start)/(self.n-5)
            raise CancelFitException()

def mlp(): return nn.Sequential(nn.Flatten(), nn.Linear(784,512), nn.ReLU(), nn.Linear(512,512), nn.ReLU(), nn.Linear(512,10))

arms = dict(plain=lambda: [], distributed=lambda: [BSFinder(method='distributed')], accumulate=lambda: [BSFinder()],
            monitor=lambda: [NoiseScaleMonitor()], **{'monitor, each batch': lambda: [NoiseScaleMonitor(every=1)]},
            **{'communication hook': lambda: [CommHook()]})

def train(learn, arm, n):
    "Seconds of a batch"
    cb = Batches(n)
    learn.fit(1, 1e-3, cbs=[*arms[arm](), cb])
    return cb.seconds

def traffic(learn, arm, n=25):
    "Bytes of a batch that gloo exchanges: of gradients (at least 1,000 numbers at once), and all others"
    with torch.profiler.profile(record_shapes=True) as prof: train(learn, arm, n)
    sizes = [4*int(np.prod(e.input_shapes[0])) for e in prof.events() if e.name=='gloo:all_reduce' and e.input_shapes[0]]
    small = [4*int(np.prod(e.input_shapes[0])) for e in prof.events() if e.name=='gloo:all_gather' and e.input_shapes[0]]
    return sum(o for o in sizes if o >= 4000)/n,(sum(o for o in sizes if o < 4000)+sum(small))/n

def main(args):
    torch.set_num_threads(1)
    x,y = mnist_tensors(args.data)
    for name,model in dict(convnet=small_convnet, mlp=mlp).items():
        set_seed(0)
        learn = image_learner(x, y, model(), bs=args.bs)
        learn.dls,res = learn.dls.shared(),{o: [] for o in arms}
        with learn.distrib_ctx(sync_bn=False), learn.no_bar(), learn.no_logging():
            for _ in range(args.rounds):
                for o in arms: res[o].append(train(learn, o, args.batches))
            sent = {o: traffic(learn, o) for o in arms}
        if dist.get_rank(): continue
        print(f'{name}, {sum(p.numel() for p in learn.model.parameters()):,} parameters, {dist.get_world_size()} processes with '
              f'batches of {args.bs}, {args.rounds} rounds of {args.batches} batches')
        rows = []
        for o,t in res.items():
            low,mid,high = np.quantile(np.array(t)/np.array(res['plain']), [.25,.5,.75])
            grads,rest = sent[o]
            rows.append({'arm': o, 'ms': 1000*np.median(t), 'times plain': round(mid, 3), 'quartiles': f'{low:.3f} to {high:.3f}',
                         'bytes of gradients': grads, 'times plain ': grads/sent['plain'][0], 'other bytes': rest})
        table(rows)
    dist.destroy_process_group()

if __name__=='__main__': main(parser(__doc__, data=True, bs=64, rounds=15, batches=105).parse_args())
