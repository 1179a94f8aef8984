#include "cpu/tile/instruction_set.h"
