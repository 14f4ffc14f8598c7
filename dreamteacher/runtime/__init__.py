"""What any program of this kind needs: errors, configs, devices, processes, run folders, checkpoints, downloads."""
