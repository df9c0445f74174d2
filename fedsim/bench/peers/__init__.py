"""Programs that fedsim is measured against; they load no fedsim, so that none of it weighs on them."""
