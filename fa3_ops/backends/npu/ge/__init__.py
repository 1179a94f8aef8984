"""Our operators in graphs of CANN's graph engine (GE), torchair's backend "npu"."""
