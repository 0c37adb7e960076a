# Imitation along the student's own trajectories: prompts are enough. A batch of 2 is trained at every step of them.
model = dict(diffusion=dict(type='PiFlowImitationDataFree'))
data = dict(workers_per_gpu=2, prefetch_factor=2, train_dataloader=dict(samples_per_gpu=2))
