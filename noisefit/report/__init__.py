"""Pictures of runs, from the files in their output folders alone: python -m noisefit.report"""
