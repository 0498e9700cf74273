"""What does it cost to watch the noise scale of a training, and does it follow?

Cost: pairs of trainings, one with `NoiseScaleMonitor()` and one without, in turns; seconds of a batch with it over those without,
on the CIFAR ResNet of the proof and on its small convnet for MNIST: the median over pairs and its 95% interval. `--device cuda`
asks a GPU, and then also for memory: what both took at most, and what a copy of the gradients takes.

Drift: on a quadratic task whose noise scale is known at every step and grows tenfold, the relative error of what it says."""
from tasks import *
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

def peak_memory(width, cbs):
    "Bytes that were allocated at most, and those of a copy of the gradients"
    torch.cuda.empty_cache()
    x = torch.randn(512, 64)
    dls = DataLoaders.from_dsets(list(zip(x, x)), [(x[0],x[0])], bs=64, num_workers=0, device='cuda')
    learn = Learner(dls, nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 64)), MSELossFlat())
    torch.cuda.reset_peak_memory_stats()
    with learn.no_logging(): learn.remove_cb(ProgressCallback).fit(1, 1e-3, cbs=cbs)
    return torch.cuda.max_memory_allocated(),4*sum(o.numel() for o in learn.model.parameters())

def memory(width):
    (without,copy),(got,_) = peak_memory(width, []),peak_memory(width, [NoiseScaleMonitor(every=1)])
    return {'parameters':copy//4, 'without (MB)':without/1e6, 'with (MB)':got/1e6, 'more, in copies':(got-without)/copy}

class Mean(nn.Module):
    "The mean of the items is all that there is to learn"
    def __init__(self, d): super().__init__(); self.w = nn.Parameter(torch.zeros(d))
    def forward(self, x): return self.w.expand(len(x), -1)

def half_square(pred, y): return (pred-y).square().sum(1).mean()/2

def drift(d, bs, n_steps, start, every, seed):
    "A row: the gradient of an item is w-x, so noise is the variance of x, and scale the square of the distance that is left"
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
    return {'parameters':d, 'batch':bs, 'steps':n_steps, 'from':exact[0], 'to':exact[-1], 'measurements':len(stats),
            'error, median':float(error.median()), 'error, 90%':float(error.quantile(.9))}

def main():
    p = parser(__doc__, data=True, seconds=5., pairs=30, device='cpu')
    p.add_argument('--only', choices=['cost','drift'])
    args = p.parse_args()
    if args.only!='drift':
        print('## Cost\n')
        table([cost(o, args.data, args.device, args.seconds, args.pairs) for o in ('CIFAR, Adam','MNIST, Adam')])
        if args.device=='cuda':
            print('## Memory\n')
            table([memory(o) for o in (1_000,100_000)])
    if args.only!='cost':
        print('## Drift\n')
        table([drift(d, bs, n, 100., 13, 0) for d,bs,n in ((1000,64,2000), (1000,64,8000), (100,64,8000), (10_000,64,2000))])

if __name__=='__main__': main()
