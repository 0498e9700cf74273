"""Is `bs_study` right, and what does it cost?

Truth: `--studies` studies of a quadratic with known noise, each of batch sizes 4 to 1,024 with `--seeds` runs. Each of
100 coordinates follows `w -= lr*w*(1+sigma*xi/sqrt(bs))` with normal `xi`, so the noise scale is `sigma`², 64, all
along the way; the learning rate follows the rule 'noise', at most 0.02. In closed form a step multiplies the mean
square of the weights with `1-2*lr+lr²*(1+64/bs)`, and the critical batch size of the steps that follow from that is
what the fits are compared with.

Cost: seconds of a training of `--epochs` epochs with the log of a study, and with its dynamics (what is computed
along the way; the sharpness at the end is extra), as a multiple of plain training in the same round; medians of
`--rounds` rounds. A convnet of 20,000 parameters on random 28x28 images in batches of 64, one thread. No data are needed."""
from common import *
from fastai_bs_finder.digits import convnet
from fastai_bs_finder.stats import fit_steps
from fastai_bs_finder.study import Dynamics, RunLog

sizes,noise,highest,target = 4**np.arange(1, 6),64.,.02,.1

def rate(bs): return highest/(1+noise/bs)

def steps_of_a_run(rng, bs):
    "Steps until the mean square of 100 weights is `target`"
    w,steps = np.ones(100),0
    while np.square(w).mean() > target:
        w -= rate(bs)*w*(1+np.sqrt(noise/bs)*rng.standard_normal(100))
        steps += 1
    return steps

def in_theory():
    "The critical batch size of the mean number of steps"
    lr = rate(sizes)
    steps = math.log(target)/np.log(1-2*lr+lr**2*(1+noise/sizes))
    return fit_steps(sizes, steps+.5).critical # the last step is a whole one: half of it is too much, on average

def truth(studies, seeds):
    rng,theory,fits = np.random.default_rng(0),in_theory(),[]
    for _ in range(studies):
        bs = np.repeat(sizes, seeds)
        fits.append(fit_steps(bs, [steps_of_a_run(rng, o) for o in bs]))
    off = np.array([o.critical/theory for o in fits])
    held = np.mean([o.lower <= theory <= o.upper for o in fits])
    print(f"Noise scale {noise:.0f}, critical batch size in theory {theory:.1f}. Fitted in {studies} studies: "
          f"{theory*off.mean():.1f} on average, furthest off {100*np.abs(off-1).max():.1f}%; "
          f"the 95% interval holds the theory's in {100*held:.0f}%\n")

def seconds(epochs, *cbs):
    learn = image_learner(torch.randn(3200,1,28,28), torch.randint(0, 10, (3200,)), convnet(1, 10)).remove_cb(ProgressCallback)
    start = time.perf_counter()
    with learn.no_logging(): learn.fit(epochs, 1e-3, cbs=[StopAfter(math.inf), *cbs])
    return time.perf_counter()-start

def cost(rounds, epochs):
    torch.set_num_threads(1)
    kinds = {'plain training': list, 'with the log': lambda: [RunLog()],
             'with dynamics': lambda: [log := RunLog(), Dynamics(log)]}
    rows = [{k: seconds(epochs, *make()) for k,make in kinds.items()} for _ in range(rounds)]
    df = pd.DataFrame(rows)
    table([{'training': k, 'seconds': float(df[k].median()), 'of plain': float((df[k]/df['plain training']).median())} for k in kinds])

if __name__=='__main__':
    args = parser(__doc__, studies=100, seeds=3, rounds=7, epochs=4).parse_args()
    truth(args.studies, args.seeds)
    cost(args.rounds, args.epochs)
