"""Does a batch that grows beat the curve of constant ones? On tasks of the proof (`tasks.py`), as many epochs of one-cycle as its
courses have: batch sizes that stay, each with the best of the peaks that `proof.py` has tried, against batches that grow from
the smallest of them by several rules. `steps/curve` is the number of optimizer steps over that at which the curve of constant
sizes has the same validation loss (1: on the curve, below 1: better), `loss/curve` the loss over that of the curve at as many."""
from proof import *
from fastai_bs_finder.schedule import BatchSizeSchedule

def cosine(pct, start=.25):
    "How much of its peak the rate of `fit_one_cycle` has after the warm-up"
    return 1. if pct < start else (1+math.cos(math.pi*(pct-start)/(1-start)))/2

def step_at(pct, times): return lambda bs: lambda p: bs*(times if p >= pct else 1)
def doubling(times): return lambda bs: lambda p: bs*2**math.floor(p*(math.log2(times)+1)*.9999)
def seesaw(most): return lambda bs: lambda p: bs*min(most, 1/max(1e-9, cosine(p))) # arXiv 2510.14717

rules = {
    'x4 at 1/2': step_at(.5, 4), 'x4 at 3/4': step_at(.75, 4), 'x8 at 1/2': step_at(.5, 8),
    'x2 each third, to x4': doubling(4), 'x2 each quarter, to x8': doubling(8), 'as the rate falls, to x8': seesaw(8)}

class Clock(Callback):
    "Steps and seconds of a training, without its validation"
    run_valid = False
    def before_fit(self): self.n_steps,self.seconds = 0,0.
    def before_train(self): self.start = time.perf_counter()
    def after_step(self): self.n_steps += 1
    def after_train(self): self.seconds += time.perf_counter()-self.start

def grown(task, data, bs, peak, rule, power, seed):
    "Validation loss, steps and seconds of a course in which the batch grows"
    learn,clock = new_learner(task, data, seed),Clock()
    learn.dls = learn.dls.with_bs(bs, val_bs=512)
    learn.dls.train.rng = random.Random(seed)
    with learn.no_logging(): learn.fit_one_cycle(
        tasks[task].epochs, float(peak), cbs=[clock, BatchSizeSchedule(rule(bs), lr_power=power)])
    return dict(loss=learn.recorder.values[-1][1], steps=clock.n_steps, seconds=clock.seconds)

def curve_of(task):
    "Of the courses with constant sizes: the loss at the best peak, by batch size"
    df = of_sweep(task, Study.load(folder(task, f'courses_{tasks[task].epochs}')).df)
    means = df.groupby(['bs','lr'])[['valid_loss','steps']].mean().reset_index()
    return means.loc[means.groupby('bs').valid_loss.idxmin()].set_index('bs')

def beside_curve(curve, loss, steps):
    "Steps and loss over those of the curve"
    c = curve.sort_values('steps')
    x,y = np.log(c.steps.to_numpy()),np.log(np.minimum.accumulate(c.valid_loss.to_numpy()))
    same_loss = np.exp(np.interp(-math.log(loss), -y, x, left=math.nan, right=math.nan))
    return steps/same_loss,loss/np.exp(np.interp(math.log(steps), x, y))

def rows_for(task, data, n_seeds):
    curve = curve_of(task)
    bs = int(curve.index[0])
    rows = [{'task':task, 'rule':f'{o} throughout', 'rate':0, 'loss':r.valid_loss, 'steps':r.steps} for o,r in curve.iterrows()]
    for nm,rule in rules.items():
        for power in (0.,.5):
            runs = pd.DataFrame([grown(task, data, bs, curve.lr[bs], rule, power, s) for s in range(n_seeds)])
            m = runs.mean()
            a,b = beside_curve(curve, m.loss, m.steps)
            rows.append({
                'task':task, 'rule':f'{bs}, {nm}', 'rate':power, 'loss':m.loss, 'spread':runs.loss.std(), 'steps':m.steps,
                'seconds':m.seconds, 'steps/curve':a, 'loss/curve':b})
    return rows

def main():
    p = parser(__doc__, data=True, seeds=3)
    p.add_argument('--task', choices=tasks, help='only this one')
    args = p.parse_args()
    for task in tasks:
        if args.task not in (None,task) or not is_done(task): continue
        table(rows_for(task, args.data, args.seeds))

if __name__=='__main__': main()
