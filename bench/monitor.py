"""What does it cost to watch the noise scale of a training, and does it follow?

Cost: pairs of trainings, one with `NoiseScaleMonitor()` and one without, in turns; seconds of a batch with it over those without,
on the CIFAR ResNet of the proof and on its small convnet for MNIST: the median over pairs and its 95% interval. `--device cuda`
asks a GPU.

Memory: what tensors held at most in three batches that were all measured, beside three that were not.

Drift: on a quadratic task whose noise scale is known at every step and grows tenfold, the relative error of what it says, from
the ninth measurement on; medians over three seeds."""
from tasks import *
import gc, weakref
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from fastai_bs_finder.monitor import NoiseScaleMonitor

class Seconds(Callback):
    "Ends a training after so many seconds, validations not counted; the time of a batch, all other things included"
    order,run_valid = 90,False
    def __init__(self, seconds): self.seconds,self.took,self.n = seconds,0.,0
    def before_train(self): self.start = time.perf_counter()
    def after_batch(self):
        now = time.perf_counter()
        self.took,self.start,self.n = self.took+now-self.start,now,self.n+1
        self.per_batch = self.took/self.n
        if self.took > self.seconds: raise CancelFitException()

def per_batch(task, data, device, seconds, cbs):
    "Seconds of a batch"
    learn,clock = learner(task, data, 64).remove_cb(ProgressCallback),Seconds(seconds)
    learn.dls.to(device)
    with learn.no_logging(): learn.fit(100, 1e-3, cbs=[clock, *cbs])
    return clock,learn

def median_of(xs):
    "Median, and the order statistics that are its 95% interval"
    xs,n = sorted(xs),len(xs)
    k = max(0, int(n/2-.98*n**.5))
    return f'{np.median(xs):.3f} ({xs[k]:.3f} to {xs[n-1-k]:.3f})'

def cost(task, data, device, seconds, n_pairs):
    "A row: the ratio, and how often it was measured"
    per_batch(task, data, device, seconds, [])
    ratios = []
    for i in range(n_pairs):
        res = {}
        for on in (True,False) if i%2 else (False,True):
            clock,learn = per_batch(task, data, device, seconds, [NoiseScaleMonitor()]*on)
            res[on] = clock.per_batch
            if on: n,measured = clock.n,len(learn.recorder.bs_find_stats)
        ratios.append(res[True]/res[False])
    params = sum(o.numel() for o in learn.model.parameters())
    return {'task':task, 'parameters':params, 'ms a batch':1e3*res[False], 'batches':n, 'measurements':measured,
            'with/without':median_of(ratios)}

class LiveBytes(TorchDispatchMode):
    "What tensors that are made in here hold at most; on a GPU its own counter says it"
    def __init__(self): super().__init__(); self.now,self.peak,self.live = 0,0,set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        res = func(*args, **(kwargs or {}))
        for o in tree_leaves(res):
            if isinstance(o, Tensor): self.see(o.untyped_storage())
        return res

    def see(self, storage):
        key,n = storage._cdata,storage.nbytes()
        if key in self.live: return
        self.live.add(key)
        self.now += n
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.gone, key, n)

    def gone(self, key, n):
        self.live.discard(key)
        self.now -= n

class Peak(Callback):
    "Memory of three batches, after some others"
    order,run_valid = -100,False
    def before_batch(self):
        if self.train_iter!=8: return
        self.mode = LiveBytes()
        self.mode.__enter__()
    def after_batch(self):
        if self.train_iter!=11: return
        self.mode.__exit__(None, None, None)
        raise CancelFitException()

def peak_memory(task, data, device, cbs):
    "Bytes at most; those of the parameters"
    learn,peak = learner(task, data, 64).remove_cb(ProgressCallback),Peak()
    learn.dls.to(device)
    gc.collect()
    if device=='cuda': torch.cuda.empty_cache(), torch.cuda.reset_peak_memory_stats()
    with learn.no_logging(): learn.fit(1, 1e-3, cbs=[peak, *cbs])
    most = torch.cuda.max_memory_allocated() if device=='cuda' else peak.mode.peak
    return most,4*sum(o.numel() for o in learn.model.parameters())

def memory(task, data, device):
    "A row: more memory, in copies of the gradients and of the whole"
    (without,copy),(got,_) = (peak_memory(task, data, device, o) for o in ([],[NoiseScaleMonitor(every=1)]))
    return {'task':task, 'MB without':without/1e6, 'MB with':got/1e6, 'with/without':got/without,
            'more, in copies of the gradients':(got-without)/copy}

class Mean(nn.Module):
    "The mean of the items is all that there is to learn"
    def __init__(self, d): super().__init__(); self.w = nn.Parameter(torch.zeros(d))
    def forward(self, x): return self.w.expand(len(x), -1)

def half_square(pred, y): return (pred-y).square().sum(1).mean()/2

def drift(d, bs, n_steps, start, every, seed):
    "The gradient of an item is w-x, so noise is the variance of x, and scale the square of the distance that is left"
    set_seed(seed)
    n,noise = bs*n_steps,1.
    x = torch.randn(n, d)*(noise/d)**.5 + (noise/start/d)**.5
    dls = DataLoaders.from_dsets(list(zip(x, x)), [(x[0],x[0])], bs=bs, num_workers=0, drop_last=True, device='cpu')
    mean,exact = torch.full((d,), (noise/start/d)**.5),[]
    class Exact(Callback):
        def before_step(self): exact.append(noise/(self.model.w-mean).square().sum().item())
    learn = Learner(dls, Mean(d), half_square, opt_func=SGD).remove_cb(ProgressCallback)
    with learn.no_logging(): learn.fit(1, math.log(10)/2/n_steps, cbs=[Exact(), NoiseScaleMonitor(every=every)])
    stats = learn.recorder.bs_find_stats
    exact = np.array(exact)[stats.index-1]
    error = np.abs(stats.noise_scale/exact-1)[8:]
    return {'parameters':d, 'batch':bs, 'steps':n_steps, 'every':every, 'from':exact[0], 'to':exact[-1],
            'measurements':len(stats), 'error, median':error.median(), 'error, 90%':error.quantile(.9)}

def drifts(*args):
    "A row: medians over seeds"
    return pd.DataFrame([drift(*args, seed) for seed in range(3)]).median().to_dict()

def main():
    p = parser(__doc__, data=True, seconds=5., pairs=30, device='cpu')
    p.add_argument('--only', choices=['cost','memory','drift'])
    args,chosen = p.parse_args(),('CIFAR, Adam','MNIST, Adam')
    if args.only in (None,'memory'):
        print('## Memory\n')
        table([memory(o, args.data, args.device) for o in chosen])
    if args.only in (None,'cost'):
        print('## Cost\n')
        table([cost(o, args.data, args.device, args.seconds, args.pairs) for o in chosen])
    if args.only in (None,'drift'):
        print('## Drift\n')
        table([drifts(d, 64, n, 100., every) for d,n,every in (
            (1000,2000,13), (1000,8000,13), (100,8000,13), (100,8000,3), (4000,2000,13))])

if __name__=='__main__': main()
