/* As program_x86_64.S, for aarch64. x24: head, x19: operation, w20: errno of the candidates so far, w21: kind. System calls change x0 only. */
.globl _start, launch
_start:
  b map
.balign 16
launch:
  mov x9, x0
  ldr x8, [x9, #24]
  ldp x0, x1, [x9, #32]
  ldr x2, [x9, #48]
  mov x3, #0
  mov x4, #0
  svc #0
  cbz x0, child
  ret
child:
  mov x24, x9
  b run
map:
  mov x0, #0x10000000
  mov x1, #0x1000000
  mov x2, #3
  mov x3, #0x12
  mov x4, #3
  mov x5, #0
  mov x8, #222
  svc #0
  mov x1, #0x10000000
  cmp x0, x1
  b.ne die
  mov x24, x0
run:
  ldr x19, [x24]
  mov w20, #0
next:
  ldrb w21, [x19, #56]
  cmp w21, #6
  b.eq candidates
  cmp w21, #7
  b.eq store
  cmp w21, #8
  b.eq spin
  ldr x8, [x19]
  ldp x0, x1, [x19, #8]
  ldp x2, x3, [x19, #24]
  ldp x4, x5, [x19, #40]
  svc #0
  tbnz x0, #63, error
  cmp w21, #4
  b.lo advance
  cbz x0, zero
  b.ne advance
  ldr x19, [x19, #48]
  b next
zero:
  cmp w21, #5
  b.ne advance
  mov x0, #137
  b exit
spin:
  ldr x0, [x19, #8]
wait:
  yield
  ldr x1, [x0]
  cbz x1, wait
  b advance
store:
  ldp x1, x2, [x19, #8]
  ldr x1, [x1]
  str x2, [x1]
advance:
  add x19, x19, #64
  b next
error:
  neg w0, w0
  cmp w21, #1
  b.eq advance
  cmp w21, #2
  b.ne fail
  ldrb w1, [x19, #57]
  cmp w0, w1
  b.eq advance
fail:
  ldrh w2, [x19, #58]
  ldr x1, [x24, #8]
  str w2, [x1]
  str w0, [x1, #4]
  ldr x0, [x24, #16]
  tbnz x0, #63, die
  mov x2, #8
  mov x8, #64
  svc #0
die:
  mov x0, #127
exit:
  mov x8, #94
  svc #0
  brk #0
candidates:
  ldr x22, [x19, #8]
  add x23, x22, #24
each:
  ldr x0, [x23], #8
  cbz x0, none
  ldp x1, x2, [x22]
  mov x8, #221
  svc #0
  neg w0, w0
  cmp w0, #13
  b.eq keep
  cmp w0, #2
  b.eq first
  cmp w0, #20
  b.eq first
  mov w20, w0
  b none
first:
  cbnz w20, each
keep:
  mov w20, w0
  b each
none:
  mov w0, w20
  b fail
