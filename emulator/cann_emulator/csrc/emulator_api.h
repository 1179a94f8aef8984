// What the runtime (libascendcl.so) offers to the other emulated libraries and to Python.
#pragma once
extern "C" {
// Runs fn(arg) on the stream: in order, lazily under CANNEMU_LAZY, recorded while it captures.
// fn returns 0, or an error code after emu_fail. `destroy` is called once nothing can run fn again.
int emu_submit(void* stream, int (*fn)(void*), void* arg, void (*destroy)(void*));
int emu_drain(void* stream);      // runs all that is queued on the stream; an error while capturing
int emu_capturing(void* stream);  // 1 while the stream is being captured
int emu_lazy();                   // 1 under CANNEMU_LAZY
int emu_pending();                // tasks queued on all streams
int emu_fail(int code, const char* text);  // sets the text of the error, returns the code
long emu_harmless(const char* name);       // for the generated stubs of CANN's functions
long emu_unemulated(const char* name);
long emu_abort(const char* name);
void emu_register_ir(const char* op, const char* inputs, const char* outputs, const char* attrs);
}
