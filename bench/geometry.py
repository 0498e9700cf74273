"""Which noise scale tells the critical batch size of Adam? On the tasks of the proof (`tasks.py`) with Adam, three of them beside
the critical size that the proof has fitted to steps: the Euclidean one, tr(Sigma)/|G|^2; that of the l1 norm for optimizers that
go by signs, (sum of sigma_i)^2/(sum of |G_i|)^2 (arXiv 2602.03001); and Adam's preconditioned one, of gradients over the root of
their running mean square (as petuum/adaptdl has it).

Each task is trained at batches of 64 with the sweep's best learning rate: 60 steps, half of those to the target, and all of them.
Then, at weights that stand still, gradients of up to 1,000 micro-batches of 64 are taken. The table has the noise scales over the
fitted size, geometric means over seeds. `off by` is the median factor between the two over the tasks; `spread` is the factor that
is left where all tasks may be corrected by one number (the exponential of the standard deviation of the logarithms).

A second table has the bias of few micro-batches in the l1 norm: of the first 20, as it is and corrected, over that of all.

What was measured is kept in `results/geometry.csv`; remove lines to measure them again."""
from proof import *
from itertools import islice

def train_some(task, data, n, lr, seed):
    "A learner after `n` steps"
    learn = new_learner(task, data, seed)
    with learn.no_logging(): learn.fit(10_000, lr, cbs=StopAfter(n))
    return learn

def gradients(learn, n):
    "Gradients of up to `n` micro-batches at weights that stand still, a row each"
    ps,res = [p for p in learn.model.parameters() if p.requires_grad],[]
    learn.model.train()
    for b in islice(learn.dls.train, n):
        learn._split(b)
        loss = learn.loss_func(learn.model(*learn.xb), *learn.yb)
        res.append(torch.cat([g.as_subclass(Tensor).flatten() for g in torch.autograd.grad(loss, ps)]))
    return torch.stack(res)

def preconditioner(learn):
    "What Adam multiplies the entries of the gradient with"
    def one(p, h):
        s = learn.opt.state[p]
        return 1/((s['sqr_avg']/(1-h['sqr_mom']**s['step'])).sqrt()+h['eps'])
    return torch.cat([one(p, h).flatten() for pl,h in zip(learn.opt.param_lists, learn.opt.hypers) for p in pl])

def euclidean(g, bs, p=1.):
    "From gradients of micro-batches: noise over scale, without bias, entries times `p`"
    noise = ((g*p).var(0).sum(dtype=torch.float64)*bs).item()
    scale = (g.mean(0)*p).square().sum(dtype=torch.float64).item()-noise/bs/len(g)
    return noise/max(scale, 1e-12*noise)

def l1(g, bs, correct=True):
    """The ratio of squared l1 norms. The mean of few gradients is longer than G by what chance adds, about as 1/n: twice that of
    all, less the mean of both halves' (`correct`). A standard deviation of n draws is too small by about 1/(4n-4)"""
    n,norm = len(g),g.mean(0).abs().sum().item()
    sigma = g.std(0).sum().item()*bs**.5
    if not correct: return (sigma/norm)**2
    halves = sum(o.mean(0).abs().sum().item() for o in (g[:n//2],g[n//2:]))/2
    return (sigma*(1+1/(4*n-4))/(2*norm-halves))**2

kinds = 'euclidean','l1','preconditioned'

def measure(task, data, i):
    "A row: the three noise scales after 60 steps, half of the way and all of it"
    seed,when = divmod(i, 3)
    best = Study.load(folder(task, 'sweep')).best().loc[64]
    n = [60, int(best.steps_to_target/2), int(best.steps_to_target)][when]
    learn = train_some(task, data, n, float(best.lr), seed)
    g = gradients(learn, 1000)
    return dict(
        seed=seed, when=['60 steps','half way','target'][when], steps=n, euclidean=euclidean(g, 64), l1=l1(g, 64),
        preconditioned=euclidean(g, 64, preconditioner(learn)), l1_20=l1(g[:20], 64, False), l1_20_corrected=l1(g[:20], 64))

def geomean(o): return np.exp(np.log(o).mean())

def report(df, names):
    "Fitted sizes; the noise scales over them; those of few micro-batches over those of all"
    fitted = pd.Series({o: Study.load(folder(o, 'sweep')).critical().critical for o in names})
    rows = []
    for when,o in df.groupby('when', sort=False):
        ratios = o.groupby('task', sort=False)[[*kinds]].agg(geomean).div(fitted, axis=0).loc[names]
        for k in kinds:
            logs = np.log(ratios[k])
            rows.append({'when':when, 'noise scale':k} | ratios[k].to_dict() | {
                'off by':math.exp(np.median(np.abs(logs))), 'spread':math.exp(logs.std())})
    few = df.assign(raw=df.l1_20/df.l1, corrected=df.l1_20_corrected/df.l1).groupby('task', sort=False)
    return fitted,rows,few[['raw','corrected']].median().reset_index().to_dict('records')

def main():
    args = parser(__doc__, data=True, seeds=3).parse_args()
    names = [o for o in tasks if 'Adam' in o]
    df = pd.concat([kept('geometry', o, 3*args.seeds, partial(measure, o, args.data)) for o in names])
    fitted,rows,few = report(df, names)
    print('## Noise scale over the fitted critical batch size\n')
    print('Fitted: ' + ', '.join(f'{k} {v:,.0f}' for k,v in fitted.items()) + '\n')
    table(rows)
    print('## The l1 noise scale of 20 micro-batches over that of all\n')
    table(few)

if __name__=='__main__': main()
