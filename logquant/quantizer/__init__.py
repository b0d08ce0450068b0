"""What the quantiser is told: by the newest queries of a sequence, or by a calibration of the model."""
