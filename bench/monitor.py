"""What does it cost to watch the noise scale of a training, and does it follow?

Cost: pairs of trainings, one with `NoiseScaleMonitor()` and one without, in turns; seconds of a batch with it over those without,
the median over pairs, on the CIFAR ResNet of the proof and on its small convnet for MNIST.

Drift: on a quadratic task whose noise scale is known at every step and grows tenfold, the relative error of what the monitor says."""
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

def per_batch(task, data, seconds, cbs):
    "Seconds of a batch"
    learn,clock = learner(task, data, 64).remove_cb(ProgressCallback),Seconds(seconds)
    with learn.no_logging(): learn.fit(100, 1e-3, cbs=[clock, *cbs])
    return clock.per_batch,learn

def cost(task, data, seconds, n_pairs):
    "A row: the ratio, and how often it was measured"
    per_batch(task, data, seconds/4, [])
    ratios = []
    for i in range(n_pairs):
        res = {}
        for on in (True,False) if i%2 else (False,True): res[on],_ = per_batch(task, data, seconds, [NoiseScaleMonitor()]*on)
        ratios.append(res[True]/res[False])
    learn = per_batch(task, data, seconds, [NoiseScaleMonitor()])[1]
    stats = learn.recorder.bs_find_stats
    params = sum(o.numel() for o in learn.model.parameters())
    return {'task':task, 'parameters':params, 'batches':stats.index[-1], 'measurements':len(stats),
            'with/without, median':float(np.median(ratios)), 'of each pair':', '.join(f'{o:.3f}' for o in ratios)}

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
    p = parser(__doc__, data=True, seconds=20., pairs=5)
    p.add_argument('--only', choices=['cost','drift'])
    args = p.parse_args()
    if args.only!='drift':
        print('## Cost\n')
        table([cost(o, args.data, args.seconds, args.pairs) for o in ('CIFAR, Adam','MNIST, Adam')])
    if args.only!='cost':
        print('## Drift\n')
        table([drift(d, bs, n, 100., 13, 0) for d,bs,n in ((1000,64,2000), (1000,64,8000), (100,64,8000), (10_000,64,2000))])

if __name__=='__main__': main()
