"""Does the answer depend on how the machine feels? `bs_find()` on tasks of the proof (`tasks.py`), alone on the machine and beside
busy processes that keep every core occupied: what it says, and how long it takes."""
from proof import *
from multiprocessing import Event, Process
from fastai_bs_finder.finder import *

def spin(done):
    while not done.is_set(): sum(range(10_000))

def ask(task, data, n_busy):
    "What `bs_find` says beside `n_busy` busy processes"
    learn,done = new_learner(task, data, 0),Event()
    busy = [Process(target=spin, args=(done,), daemon=True) for _ in range(n_busy)]
    for o in busy: o.start()
    try:
        start = time.perf_counter()
        sugg = learn.bs_find(show_plot=False)
        seconds = time.perf_counter()-start
    finally:
        done.set()
        for o in busy: o.join()
    return dict(task=task, busy=n_busy, **sugg._asdict(), seconds=seconds, ended=learn.recorder.race.ended or 'all was raced')

def main():
    p = parser(__doc__, data=True, busy=4)
    p.add_argument('--task', choices=tasks, help='only this one')
    args = p.parse_args()
    table([ask(task, args.data, n) for task in tasks if args.task in (None,task) for n in (0,args.busy)])

if __name__=='__main__': main()
